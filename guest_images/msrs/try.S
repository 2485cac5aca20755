/* SPDX-License-Identifier: MIT
 *
 * bool try_read(uint32_t msr, uint64_t *value), bool try_write(uint32_t msr, uint64_t value): RDMSR and WRMSR; false where
 * they raise an exception. The exception handler calls try_failed() for one between try_first and try_last.
 */
        .file   "try.S"
        .text
        .globl  try_read, try_write, try_failed, try_first, try_last
try_read:
        mov     %edi, %ecx
        mov     %rsp, try_stack
try_first:
        rdmsr
        mov     %eax, (%rsi)
        mov     %edx, 4(%rsi)
        mov     $1, %eax
        ret
try_write:
        mov     %edi, %ecx
        mov     %esi, %eax
        mov     %rsi, %rdx
        shr     $32, %rdx
        mov     %rsp, try_stack
try_last:
        wrmsr
        mov     $1, %eax
        ret
try_failed:
        mov     try_stack, %rsp         /* the exception's frame is dropped */
        xor     %eax, %eax
        ret

        .bss
        .balign 8
try_stack:
        .skip   8

        .section .note.GNU-stack, "", @progbits
