/* SPDX-License-Identifier: MIT
 *
 * One entry a vector, 16 bytes apart, that makes every exception look alike: error code (0 where the processor
 * pushes none), vector, RAX, and on to exception_handler(), which does not return.
 */
        .file   "vectors.S"
        .section .text.vectors, "ax"
        .globl  exception_entries
        .balign 16
exception_entries:
        .set    vector, 0
        .rept   32
        .balign 16
        /* #DF #TS #NP #SS #GP #PF #AC #CP #VC #SX come with an error code (SDM Vol. 3, table "Protected-Mode
         * Exceptions and Interrupts"; APM Vol. 2, "Vectors"). */
        .if     (1 << vector) & 0x60227d00 == 0
        push    $0
        .endif
        push    $vector
        jmp     exception
        .set    vector, vector + 1
        .endr

exception:
        push    %rax
        mov     $0x10, %eax             /* from CPL 3 the data segments are null */
        mov     %eax, %ds
        mov     %eax, %es
        mov     %rsp, %rdi
        and     $-16, %rsp
        call    exception_handler
        ud2

        .section .note.GNU-stack, "", @progbits
