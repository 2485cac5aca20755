/* SPDX-License-Identifier: MIT
 *
 * void enter_cpl3(void (*function)(struct answers *), struct answers *argument, void *stack_top)
 * _Noreturn void leave_cpl3(void)
 *
 * There and back: IRETQ goes to CPL 3; there a UD2 comes back, by way of exception_handler(), which calls
 * leave_cpl3() and so makes enter_cpl3() return. A fault, because on an interpreting KVM SYSCALL cannot do it and
 * INT n cannot be executed.
 */
        .file   "cpl3.S"
        .set    TSS_RSP0, 0x1104        /* README.md: the TSS is at 0x1100; RSP0 is its second field */
        .set    USER_DATA, 0x1b
        .set    USER_CODE, 0x23
        .set    RFLAGS, 0x2             /* the bit that is always set; no interrupts */

        .text
        .globl  enter_cpl3, leave_cpl3
enter_cpl3:
        push    %rbx
        push    %rbp
        push    %r12
        push    %r13
        push    %r14
        push    %r15
        mov     %rsp, TSS_RSP0          /* the fault's frame goes below what was just saved */
        push    $USER_DATA
        push    %rdx
        push    $RFLAGS
        push    $USER_CODE
        push    $user_start
        iretq

leave_cpl3:
        mov     TSS_RSP0, %rsp
        pop     %r15
        pop     %r14
        pop     %r13
        pop     %r12
        pop     %rbp
        pop     %rbx
        ret

        .section .user.text, "ax"
        .globl  user_end
user_start:
        mov     %rdi, %rax
        mov     %rsi, %rdi
        call    *%rax
user_end:
        ud2

        .section .note.GNU-stack, "", @progbits
