/* SPDX-License-Identifier: MIT
 *
 * Entry and end of the 32-bit guests: void start(EAX, EBX), as the boot protocol left them, on a stack of its own. The
 * descriptor table is loaded first, for neither protocol promises one.
 */
        .file   "start.S"
        .section .text.start, "ax"
        .globl  _start
_start:
        mov     $stack_top, %esp
        push    %ebx
        push    %eax
        lgdt    gdt_pointer
        ljmp    $0x08, $1f
1:      mov     $0x10, %eax
        mov     %eax, %ds
        mov     %eax, %es
        mov     %eax, %ss
        call    start
        push    %eax
        call    guest_exit

        .globl  guest_exit
guest_exit:
        mov     4(%esp), %eax
        out     %al, $0xf4
        /* A machine without the debug-exit port: rest in peace. */
1:      cli
        hlt
        jmp     1b

        .section .rodata
        .balign 8
gdt:    .quad   0
        .quad   0x00cf9b000000ffff
        .quad   0x00cf93000000ffff
gdt_pointer:
        .word   . - gdt - 1
        .long   gdt

        .section .bss
        .balign 16
        .skip   4096
stack_top:

        .section .note.GNU-stack, "", @progbits
