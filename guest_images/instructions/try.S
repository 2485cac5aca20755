/* SPDX-License-Identifier: MIT
 *
 * int try_code(void (*code)(void)): calls it; -1, or the vector of the exception that it raised.
 * void try_failed(uint64_t vector): called by the exception handler; makes try_code() return the vector.
 *
 * The code finds 64 bytes of scratch memory at RSI, aligned to 64, and 1 in ECX.
 */
        .file   "try.S"
        .text
        .globl  try_code, try_failed
try_code:
        push    %rbx
        push    %rbp
        push    %r12
        push    %r13
        push    %r14
        push    %r15
        mov     %rsp, try_stack
        mov     $try_scratch, %esi
        mov     $1, %ecx
        call    *%rdi
        mov     $-1, %eax
back:
        pop     %r15
        pop     %r14
        pop     %r13
        pop     %r12
        pop     %rbp
        pop     %rbx
        ret

try_failed:
        mov     try_stack, %rsp         /* the code's frame and the exception's are dropped */
        mov     %edi, %eax
        jmp     back

        .bss
        .balign 64
try_scratch:
        .skip   64
try_stack:
        .skip   8

        .section .note.GNU-stack, "", @progbits
