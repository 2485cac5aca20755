/* SPDX-License-Identifier: MIT
 *
 * The first process of a 32-bit Linux, which switches the machine off. It needs no C library for i386.
 */
#define NR_REBOOT 88

        .globl  _start
_start: movl    $NR_REBOOT, %eax
        movl    $0xfee1dead, %ebx /* LINUX_REBOOT_MAGIC1, LINUX_REBOOT_MAGIC2, LINUX_REBOOT_CMD_POWER_OFF */
        movl    $0x28121969, %ecx
        movl    $0x4321fedc, %edx
        int     $0x80
        hlt

        .section .note.GNU-stack, "", @progbits
