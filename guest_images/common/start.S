/* SPDX-License-Identifier: MIT
 *
 * Entry and end of every guest. The start state (README.md) passes the command line, the bytes of RAM and the
 * number of vCPUs in RDI, RSI and RDX, which is where a C function has its first three arguments, and gives a stack.
 * The memory is zero, so there is no .bss to clear.
 */
        .file   "start.S"
        .section .text.start, "ax"
        .globl  _start
_start:
        call    guest_main
        mov     %eax, %edi

        .globl  guest_exit
guest_exit:
        mov     %edi, %eax
        out     %al, $0xf4
        /* A machine without the debug-exit port: rest in peace. */
1:      cli
        hlt
        jmp     1b

        .section .note.GNU-stack, "", @progbits
