/* SPDX-License-Identifier: MIT
 *
 * compare: executes one small piece of code after the other and prints what each has done to registers, flags and
 * memory, or which exception it raised, so that two machines can be compared line by line. This file: the entry (PVH, 32-bit
 * mode), the tables of 64-bit mode, how a case is entered and left. The runner is in compare.c, the cases are in cases.S.
 *
 * Every gate of the IDT switches to a stack of its own (IST), so that an exception comes through whatever a case has
 * done to its stack.
 */
        .file   "entry.S"

        .section .text.start, "ax"
        .code32
        .globl  _start
_start: mov     $stack_top, %esp
        mov     %ebx, %ebp
        /* CR4.PAE, OSFXSR, OSXMMEXCPT; EFER.LME, NXE, SCE; then paging. */
        mov     $0x620, %eax
        mov     %eax, %cr4
        mov     $pml4, %eax
        mov     %eax, %cr3
        mov     $0xc0000080, %ecx
        rdmsr
        or      $0x901, %eax
        wrmsr
        mov     $0x80010033, %eax
        mov     %eax, %cr0
        lgdt    gdt_pointer
        ljmp    $0x08, $1f

        .code64
1:      mov     $0x10, %eax
        mov     %eax, %ds
        mov     %eax, %es
        mov     %eax, %ss
        mov     $0, %eax
        mov     %eax, %fs
        mov     %eax, %gs
        mov     $0xff, %al              /* no interrupts of a PC's devices */
        out     %al, $0x21
        out     %al, $0xa1
        mov     $0xfee00000, %eax
        movl    $0x1ff, 0xf0(%rax)      /* the local APIC is on */
        movl    $0x10000, 0x350(%rax)
        movl    $0x10000, 0x360(%rax)
        mov     %ebp, %edi
        call    compare_main
        out     %al, $0xf4
1:      cli
        hlt
        jmp     1b

/* void enter(const struct testcase *rdi): runs a case; returns when it has ended or raised an exception. */
        .globl  enter
enter:  push    %rbx
        push    %rbp
        push    %r12
        push    %r13
        push    %r14
        push    %r15
        mov     %rsp, saved_rsp
        mov     20(%rdi), %eax          /* SS */
        push    %rax
        pushq   $case_stack_top
        pushq   24(%rdi)                /* RFLAGS */
        mov     16(%rdi), %eax          /* CS */
        push    %rax
        pushq   8(%rdi)                 /* RIP */
        mov     $0x8877665544332211, %rax
        mov     $0x0102030405060708, %rbx
        mov     $3, %ecx
        mov     $0x99, %edx
        mov     $0x40000000, %esi
        mov     $0x40000100, %edi
        mov     $0x40000200, %ebp
        mov     $0xd0000000, %r8d       /* no memory */
        mov     $0xfee00000, %r9d       /* the local APIC */
        mov     $0xfec00000, %r10d      /* the I/O APIC */
        xor     %r11d, %r11d
        mov     $1 << 63, %r12          /* no canonical address */
        xor     %r13d, %r13d
        xor     %r14d, %r14d
        xor     %r15d, %r15d
        fninit
        iretq

/* All vectors: the number on the stack, and below it an error code, 0 where the processor pushes none. */
        .balign 16
        .globl  stubs
stubs:
        .set    vector, 0
        .rept   256
        .balign 16
        .if     (vector == 8) || ((vector >= 10) && (vector <= 14)) || (vector == 17) || (vector == 21)
        .else
        pushq   $0
        .endif
        pushq   $vector
        jmp     common
        .set    vector, vector + 1
        .endr

common: mov     %rax, result
        mov     %rbx, result + 8
        mov     %rcx, result + 16
        mov     %rdx, result + 24
        mov     %rsi, result + 32
        mov     %rdi, result + 40
        mov     %rbp, result + 48
        mov     %r8, result + 56
        mov     %r9, result + 64
        mov     %r10, result + 72
        mov     %r11, result + 80
        mov     %r12, result + 88
        mov     %r13, result + 96
        mov     %r14, result + 104
        mov     %r15, result + 112
        .set    n, 0
        .rept   7                       /* vector, error code, RIP, CS, RFLAGS, RSP, SS */
        pop     %rax
        mov     %rax, result + 120 + 8 * n
        .set    n, n + 1
        .endr
        mov     %cr2, %rax
        mov     %rax, result + 176
        mov     %cr0, %rax
        mov     %rax, result + 184
        mov     %cr4, %rax
        mov     %rax, result + 192
        mov     %dr6, %rax
        mov     %rax, result + 200
        /* All as it was before the case. */
        mov     $0x80010033, %eax
        mov     %rax, %cr0
        mov     $0x620, %eax
        mov     %rax, %cr4
        movb    $0x87, pd0              /* where a case had it for the kernel alone; SMEP is off */
        xor     %eax, %eax
        mov     %rax, %dr7
        mov     $0xffff0ff0, %eax
        mov     %rax, %dr6
        mov     $0xc0000080, %ecx
        mov     $0xd01, %eax
        xor     %edx, %edx
        wrmsr
        mov     $0x10, %eax
        mov     %eax, %ds
        mov     %eax, %es
        mov     %eax, %ss
        mov     $0, %eax
        mov     %eax, %fs
        mov     %eax, %gs
        lldt    %ax
        mov     saved_rsp, %rsp
        mov     $0xfee00000, %eax
        movl    $0, 0xb0(%rax)          /* end of the interrupt, if it was one */
        lgdt    gdt_pointer
        pushq   $0x08
        pushq   $1f
        lretq
1:      lidt    idt_pointer
        pushq   $2
        popfq
        pop     %r15
        pop     %r14
        pop     %r13
        pop     %r12
        pop     %rbp
        pop     %rbx
        ret

        .globl  load_tables
load_tables:
        lidt    idt_pointer
        mov     $0x28, %eax
        ltr     %ax
        ret

/* Of a table of its own: counts in R15 how often it is entered, drops an error code where R13 says so, goes on R14 bytes
 * behind where it would. */
        .balign 16
        .globl  counter
counter:
        inc     %r15
        test    %r13, %r13
        jz      1f
        add     $8, %rsp
1:      add     %r14, (%rsp)
        iretq

        .data
        .globl  counting_pointer, short_pointer, idt_pointer
counting_pointer:
        .word   256 * 16 - 1
        .quad   counting
short_pointer:
        .word   14 * 16 - 1             /* up to #GP */
        .quad   idt

        .balign 16
        .globl  gdt
gdt:    .quad   0
        .quad   0x00af9b000000ffff      /* 08: 64-bit code */
        .quad   0x00cf93000000ffff      /* 10: data */
        .quad   0x00cff3000000ffff      /* 18: data, DPL 3 */
        .quad   0x00affb000000ffff      /* 20: 64-bit code, DPL 3 */
        .quad   0, 0                    /* 28: the TSS */
        .quad   0x00cf9b000000ffff      /* 38: 32-bit code */
        .quad   0x00cffb000000ffff      /* 40: 32-bit code, DPL 3 */
        .quad   0x00cf13000000ffff      /* 48: data, not present */
        .quad   0x00af1b000000ffff      /* 50: 64-bit code, not present */
        .quad   0, 0                    /* 58: a call gate to `gate_target`, DPL 3 */
        .quad   0, 0                    /* 68: the same, not present */
        .quad   0x0000820000000000, 0   /* 78: an empty LDT */
        .quad   0x00cf99000000ffff      /* 88: 32-bit code that cannot be read */
        .quad   0x00cf91000000ffff      /* 90: data that cannot be written */
        .quad   0x0040930000000fff      /* 98: data of 4 KiB */
        .quad   0x0000020000000000, 0   /* a0: an LDT that is not present */
        .quad   0x0000ef0000000000, 0   /* b0: no descriptor of code or data */
gdt_end:
gdt_pointer:
        .word   gdt_end - gdt - 1
        .quad   gdt
        .globl  idt_pointer
idt_pointer:
        .word   256 * 16 - 1
        .quad   idt

        /* Page tables. 0 to 1 GiB is itself, for programs too; so are two MiB each of what has no memory, of the I/O APIC and
         * of the local APIC, for the kernel. From 1 GiB on there are small pages, each another kind. */
        .balign 4096
pml4:   .quad   pdpt + 7
        .fill   511, 8, 0
pdpt:   .quad   pd0 + 7, pd1 + 7, 0, pd3 + 7
        .fill   508, 8, 0
        .globl  pd0
pd0:    .set    n, 0
        .rept   512
        .quad   n * 0x200000 + 0x87
        .set    n, n + 1
        .endr
pd1:    .quad   pt + 7
        .fill   511, 8, 0
pd3:    .fill   128, 8, 0
        .quad   0xd0000083
        .fill   373, 8, 0
        .quad   0xfec00093, 0xfee00093
        .fill   8, 8, 0
        .balign 4096
        .globl  pt
pt:     .quad   page + 0x0003           /* 40000000: for the kernel */
        .quad   page + 0x1001           /* 40001000: only to be read */
        .quad   0                       /* 40002000: not present */
        .quad   page + 0x3007           /* 40003000: for programs */
        .quad   page + 0x3005           /* 40004000: for programs, only to be read */
        .quad   page + 0x5003 + (1 << 63) /* 40005000: no code */
        .quad   page + 0x6003 + (1 << 51) /* 40006000: a reserved bit */
        .quad   page + 0x7007 + (1 << 63) /* 40007000: for programs, no code */
        .quad   page + 0x8003           /* 40008000: before one that is not present */
        .fill   503, 8, 0

        .bss
        .balign 4096
        .globl  page
page:   .skip   9 * 4096
        .globl  idt
idt:    .skip   4096
        .globl  counting
counting:
        .skip   4096
        .globl  tss
tss:    .skip   4096
        .skip   4096
stack_top:
        .skip   4096
        .globl  ist_top
ist_top:
        .skip   4096
        .globl  case_stack_top
case_stack_top:
        .skip   64
saved_rsp:
        .skip   8
        .globl  result
result: .skip   256

        .section .note.GNU-stack, "", @progbits
