/* SPDX-License-Identifier: MIT
 *
 * void cpuid(uint32_t leaf, uint32_t subleaf, struct registers *answer)
 *
 * All CPUID instructions of an image are this one, and the note below says where it is: whoever intercepts CPUID
 * by hardware breakpoints needs to know them all, and has four. On a user page, so that CPL 3 can call it.
 */
        .file   "cpuid.S"
        .section .user.text, "ax"
        .globl  cpuid, cpuid_site
cpuid:
        mov     %rbx, %r8               /* the caller's, and CPUID writes it */
        mov     %rdx, %r9
        mov     %edi, %eax
        mov     %esi, %ecx
cpuid_site:
        cpuid
        mov     %eax, (%r9)
        mov     %ebx, 4(%r9)
        mov     %ecx, 8(%r9)
        mov     %edx, 12(%r9)
        mov     %r8, %rbx
        ret

        .section .note.pyhv, "a", @note
        .balign 4
        .long   5, 2f - 1f, 1           /* sizes of name and descriptor, type 1: CPUID sites */
        .asciz  "pyhv"
        .balign 4
1:      .quad   cpuid_site
2:

        .section .note.GNU-stack, "", @progbits
