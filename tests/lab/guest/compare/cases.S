/* SPDX-License-Identifier: MIT
 *
 * The cases. Each begins with the registers that enter() gives (entry.S), the memory from 0x40000000 on filled with a
 * pattern, and ends with END, or with the first exception.
 */
        .file   "cases.S"

        .macro  CASE name, cs=0x08, ss=0x10, flags=0x2, section=.cases
        .pushsection \section, "a"
        .quad   771f, 772f
        .long   \cs, \ss
        .quad   \flags
        .popsection
        .pushsection .rodata
771:    .asciz  "\name"
        .popsection
772:
        .endm

        /* At CPL 3; in 32-bit code of the kernel's; of programs'. */
        .macro  USER name, flags=0x2
        .code64
        CASE    "\name", 0x23, 0x1b, \flags
        .endm
        .macro  CODE32 name, flags=0x2
        .code32
        CASE    "\name", 0x38, 0x10, \flags
        .endm
        .macro  USER32 name, flags=0x2
        .code32
        CASE    "\name", 0x43, 0x1b, \flags
        .endm
        .macro  KERNEL name, flags=0x2
        .code64
        CASE    "\name", 0x08, 0x10, \flags
        .endm

        /* What TCG cannot do, or does by other CPUID tables, so that there is nothing to compare with: run with the word `alone`
         * on the command line. */
        .macro  ALONE name, flags=0x2
        .code64
        CASE    "\name", 0x08, 0x10, \flags, .alone
        .endm

        /* Of what --compat hides: run with the word `shown`. */
        .macro  SHOWN name, flags=0x2
        .code64
        CASE    "\name", 0x08, 0x10, \flags, .shown
        .endm

        .macro  END
        int     $0x80
        .endm

        /* One instruction, which ends there or faults. */
        .macro  ONE what:vararg
        KERNEL  "\what"
        \what
        END
        .endm
        .macro  ONEUSER what:vararg
        USER    "user: \what"
        \what
        END
        .endm

        .text

/* ------------------------------------------------------------------------ exceptions, each vector in its ways */

        KERNEL  "divide by zero"
        xor     %ecx, %ecx
        div     %ecx
        END
        KERNEL  "divide overflow"
        mov     $1, %ecx
        div     %ecx
        END
        KERNEL  "idiv overflow"
        mov     $1 << 63, %rax
        cqo
        mov     $-1, %rcx
        idiv    %rcx
        END
        KERNEL  "int3"
        int3
        END
        KERNEL  "int 3"
        .byte   0xcd, 3
        END
        KERNEL  "int 0x20"
        int     $0x20
        END
        USER    "user: int3"
        int3
        END
        USER    "user: int 0x20, a gate of the kernel's"
        int     $0x20
        END
        USER    "user: int 0x81"
        int     $0x81
        END
        KERNEL  "int 0x90, a gate that is not present"
        int     $0x90
        END
        USER    "user: int 0x90, a gate that is not present"
        int     $0x90
        END
        KERNEL  "single step", 0x102
        nop
        nop
        END
        KERNEL  "popf sets TF"
        pushf
        orl     $0x100, (%rsp)
        popf
        nop
        nop
        END
        KERNEL  "ud2"
        ud2
        END
        KERNEL  "ud0"
        .byte   0x0f, 0xff, 0xc0
        END
        KERNEL  "an opcode that 64-bit mode has not"
        .byte   0x06
        END
        KERNEL  "lock on a register"
        .byte   0xf0, 0xff, 0xc8
        END
        KERNEL  "lock on a load"
        .byte   0xf0, 0x8b, 0x06
        END
        KERNEL  "x87 while CR0.TS"
        mov     %cr0, %rax
        or      $8, %rax
        mov     %rax, %cr0
        fld1
        END
        KERNEL  "sse while CR0.TS"
        mov     %cr0, %rax
        or      $8, %rax
        mov     %rax, %cr0
        movaps  %xmm0, %xmm1
        END
        KERNEL  "sse while CR0.EM"
        mov     %cr0, %rax
        or      $4, %rax
        mov     %rax, %cr0
        movaps  %xmm0, %xmm1
        END
        KERNEL  "sse while CR4.OSFXSR is 0"
        mov     %cr4, %rax
        and     $~0x200, %rax
        mov     %rax, %cr4
        movaps  %xmm0, %xmm1
        END
        KERNEL  "wait while CR0.TS and MP"
        mov     %cr0, %rax
        or      $8, %rax
        mov     %rax, %cr0
        fwait
        END
        KERNEL  "x87 fault"
        fldcw   fault_all
        fld1
        fldz
        fdivrp
        fwait
        END
        KERNEL  "sse fault"
        ldmxcsr sse_fault_all
        mov     $1, %eax
        cvtsi2sd %eax, %xmm0
        xorps   %xmm1, %xmm1
        divsd   %xmm1, %xmm0
        END
        KERNEL  "movaps, not aligned"
        movaps  1(%rsi), %xmm0
        END

/* Segments. */
        KERNEL  "load DS, not present"
        mov     $0x48, %eax
        mov     %eax, %ds
        END
        KERNEL  "load ES, not present"
        mov     $0x48, %eax
        mov     %eax, %es
        END
        KERNEL  "load SS, not present"
        mov     $0x48, %eax
        mov     %eax, %ss
        END
        KERNEL  "load FS, beyond the table"
        mov     $0xf00, %eax
        mov     %eax, %fs
        END
        KERNEL  "load GS, a system descriptor"
        mov     $0x28, %eax
        mov     %eax, %gs
        END
        KERNEL  "load SS, null"
        xor     %eax, %eax
        mov     %eax, %ss
        END
        KERNEL  "load SS, null, RPL 3"
        mov     $3, %eax
        mov     %eax, %ss
        END
        KERNEL  "load SS, code"
        mov     $8, %eax
        mov     %eax, %ss
        END
        KERNEL  "load SS, not to be written"
        mov     $0x90, %eax
        mov     %eax, %ss
        END
        KERNEL  "load SS, another privilege"
        mov     $0x1b, %eax
        mov     %eax, %ss
        END
        KERNEL  "load DS, code that cannot be read"
        mov     $0x88, %eax
        mov     %eax, %ds
        END
        KERNEL  "load DS, of the LDT, which is empty"
        mov     $0x0c, %eax
        mov     %eax, %ds
        END
        USER    "user: load DS, of the kernel"
        mov     $0x10, %eax
        mov     %eax, %ds
        END
        USER    "user: load SS, null"
        xor     %eax, %eax
        mov     %eax, %ss
        END
        KERNEL  "lldt, not present"
        mov     $0xa0, %eax
        lldt    %ax
        END
        KERNEL  "lldt, a TSS"
        mov     $0x28, %eax
        lldt    %ax
        END
        KERNEL  "ltr, busy"
        mov     $0x28, %eax
        ltr     %ax
        END
        USER    "user: lldt"
        xor     %eax, %eax
        lldt    %ax
        END
        KERNEL  "far call, not present"
        mov     $0x50, %eax
        mov     %rax, 8(%rsi)
        movabs  $0x100000, %rax
        mov     %rax, (%rsi)
        rex.w lcall *(%rsi)
        END
        KERNEL  "far jump to data"
        movl    $0x10, 8(%rsi)
        movq    $0x100000, (%rsi)
        rex.w ljmp *(%rsi)
        END
        KERNEL  "far jump, null"
        movl    $0, 8(%rsi)
        movq    $0x100000, (%rsi)
        rex.w ljmp *(%rsi)
        END
        KERNEL  "far call through a gate"
        movl    $0x58, 4(%rsi)
        lcall   *(%rsi)
        END
        USER    "user: far call through a gate"
        movl    $0x5b, 4(%rsi)
        lcall   *(%rsi)
        END
        USER    "user: far call through a gate, memory of programs"
        add     $0x3000, %esi
        movl    $0x5b, 4(%rsi)
        lcall   *(%rsi)
        END
        USER    "user: far call through a gate that is not present"
        add     $0x3000, %esi
        movl    $0x6b, 4(%rsi)
        lcall   *(%rsi)
        END
        KERNEL  "far return to code that is not present"
        pushq   $0x50
        pushq   $0x100000
        lretq
        END
        KERNEL  "far return to CPL 3"
        pushq   $0x1b
        pushq   $case_stack_top
        pushq   $0x23
        pushq   $1f
        lretq
1:      END
        KERNEL  "iret to CPL 3, SS not present"
        pushq   $0x4b
        pushq   $case_stack_top
        pushq   $2
        pushq   $0x23
        pushq   $1f
        iretq
1:      END
        KERNEL  "iret to an address that is not canonical"
        pushq   $0x10
        pushq   $case_stack_top
        pushq   $2
        pushq   $0x08
        push    %r12
        iretq
        END
        KERNEL  "iret to 32-bit code"
        pushq   $0x10
        pushq   $case_stack_top
        pushq   $2
        pushq   $0x38
        pushq   $1f
        iretq
        .code32
1:      mov     %esp, %eax
        END
        KERNEL  "iret, a null SS"
        pushq   $0
        pushq   $case_stack_top
        pushq   $2
        pushq   $0x08
        pushq   $1f
        iretq
1:      END
        KERNEL  "iret with NT", 0x4002
        pushq   $0x10
        pushq   $case_stack_top
        pushq   $2
        pushq   $0x08
        pushq   $1f
        iretq
1:      END
        KERNEL  "stack that is not canonical, push"
        mov     %r12, %rsp
        push    %rax
        END
        KERNEL  "stack that is not canonical, load by RBP"
        mov     (%rbp, %r12), %rax
        END
        KERNEL  "stack that is not canonical, call"
        mov     %r12, %rsp
        call    1f
1:      END
        KERNEL  "load that is not canonical"
        mov     (%r12), %rax
        END
        KERNEL  "jump that is not canonical"
        jmp     *%r12
        END
        KERNEL  "ret that is not canonical"
        push    %r12
        ret

/* Page faults: read, write, code; of the kernel, of programs. */
        .macro  TOUCH what, offset
        KERNEL  "read, \what"
        mov     \offset(%rsi), %rax
        END
        KERNEL  "write, \what"
        mov     %rax, \offset(%rsi)
        END
        KERNEL  "add, \what"
        add     %rax, \offset(%rsi)
        END
        KERNEL  "xadd, \what"
        lock xadd %rax, \offset(%rsi)
        END
        USER    "user: read, \what"
        mov     \offset(%rsi), %rax
        END
        USER    "user: write, \what"
        mov     %rax, \offset(%rsi)
        END
        USER    "user: xadd, \what"
        lock xadd %rax, \offset(%rsi)
        END
        KERNEL  "run, \what"
        lea     \offset(%rsi), %rax
        call    *%rax
        END
        .endm

        TOUCH   "of the kernel", 0x10
        TOUCH   "read only", 0x1010
        TOUCH   "not present", 0x2010
        TOUCH   "of programs", 0x3010
        TOUCH   "of programs, read only", 0x4010
        TOUCH   "no code", 0x5010
        TOUCH   "reserved bit", 0x6010
        TOUCH   "of programs, no code", 0x7010
        TOUCH   "across the end", 0x8ffc

        KERNEL  "write, read only, CR0.WP off"
        mov     %cr0, %rax
        and     $~0x10000, %rax
        mov     %rax, %cr0
        mov     %rax, 0x1010(%rsi)
        END
        KERNEL  "push across the end"
        lea     0x9004(%rsi), %rsp
        push    %rax
        END
        KERNEL  "rep movsb across the end"
        lea     0x8ff8(%rsi), %rdi
        mov     $16, %ecx
        rep movsb
        END
        KERNEL  "rep movsq across the end, downwards", 0x402
        lea     0x9010(%rsi), %rdi
        mov     $4, %ecx
        rep movsq
        END
        KERNEL  "rep stosl across the end"
        lea     0x8ff8(%rsi), %rdi
        mov     $16, %ecx
        rep stosl
        END
        KERNEL  "rep cmpsb"
        mov     $16, %ecx
        repe cmpsb
        END
        KERNEL  "rep scasb"
        mov     $0x80, %eax
        mov     $64, %ecx
        repne scasb
        END
        KERNEL  "rep movsb, no count"
        xor     %ecx, %ecx
        rep movsb
        END

/* Code 32 bits wide. */
        CODE32  "32: bound, within"
        movl    $0, (%esi)
        movl    $0x7fffffff, 4(%esi)
        bound   %eax, (%esi)
        END
        CODE32  "32: bound, outside"
        movl    $0, (%esi)
        movl    $2, 4(%esi)
        bound   %ecx, (%esi)
        END
        CODE32  "32: into", 0x802
        into
        END
        CODE32  "32: into, no overflow"
        into
        END
        CODE32  "32: push of a segment"
        push    %cs
        pop     %eax
        END
        CODE32  "32: aam 0"
        .byte   0xd4, 0
        END
        CODE32  "32: daa"
        mov     $0x9b, %al
        daa
        END
        CODE32  "32: pusha, popa"
        pusha
        add     %esi, (%esp)
        popa
        END
        CODE32  "32: beyond the limit of a segment"
        mov     $0x98, %eax
        mov     %eax, %es
        mov     %es:0x1000, %eax
        END
        CODE32  "32: beyond the limit of the stack"
        mov     $0x98, %eax
        mov     %eax, %ss
        mov     $0x2000, %esp
        push    %eax
        END
        CODE32  "32: write to what cannot be written"
        mov     $0x90, %eax
        mov     %eax, %es
        mov     %eax, %es:(%esi)
        END
        CODE32  "32: through a null segment"
        xor     %eax, %eax
        mov     %eax, %es
        mov     %es:(%esi), %eax
        END
        CODE32  "32: write to code"
        mov     %eax, %cs:(%esi)
        END
        CODE32  "32: lcall, not present"
        lcall   $0x50, $0x100000
        END
        USER32  "user32: int 0x20"
        int     $0x20
        END
        USER32  "user32: read of the kernel's"
        mov     (%esi), %eax
        END
        USER32  "user32: cli"
        cli
        END
        USER32  "user32: far call through a gate"
        lcall   $0x5b, $0
        END
        USER32  "user32: iret to a lower CPL"
        pushf
        push    $0x38
        push    $1f
        iret
1:      END

/* Privileged, and what depends on what is shown. */
        ONEUSER hlt
        ONEUSER cli
        ONEUSER sti
        ONEUSER in $0x80, %al
        ONEUSER out %al, $0x80
        ONEUSER mov %cr0, %rax
        ONEUSER mov %rax, %cr3
        ONEUSER mov %dr7, %rax
        ONEUSER rdmsr
        ONEUSER wrmsr
        ONEUSER lgdt (%rsi)
        ONEUSER lidt (%rsi)
        ONEUSER lmsw %ax
        ONEUSER clts
        ONEUSER invlpg (%rsi)
        ONEUSER invd
        ONEUSER wbinvd
        ONEUSER swapgs
        ONEUSER sysretq
        ONEUSER xsetbv
        ONEUSER vmcall
        ONEUSER vmmcall
        ONEUSER rsm
        ONEUSER monitor
        ONEUSER mwait
        ONEUSER rdpmc
        ONEUSER lldt %ax
        ONEUSER ltr %ax

        ONE     vmcall
        ONE     vmmcall
        ONE     vmlaunch
        ONE     vmxoff
        ONE     vmrun
        ONE     vmload
        ONE     stgi
        ONE     clgi
        ONE     invlpga
        ONE     skinit
        ONE     rsm
        ONE     monitor
        ONE     mwait
        ONE     getsec
        ONE     xsetbv
        ONE     xgetbv
        ALONE   "rdpmc"
        rdpmc
        END
        KERNEL  "invpcid"
        invpcid (%rsi), %rax
        END
        ONE     rdpkru
        ONE     clac
        ONE     stac
        ONE     fxsave (%rsi)
        ONE     fxsave 8(%rsi)
        ONE     xsave (%rsi)
        ONE     rdfsbase %rax
        ONE     lfence
        ONE     mfence
        ONE     sfence
        ONE     clflush (%rsi)
        ONE     prefetchnta (%r12)
        ONE     pause
        ONE     endbr64
        ONE     nopl (%r12)

        ALONE   "int1"
        .byte   0xf1
        END
        ALONE   "int1, its gate not present"
        movb    $0x0e, idt + 16 * 1 + 5
        .byte   0xf1
        END
        ALONE   "int1, counted"
        lidt    counting_pointer
        .byte   0xf1
        lidt    idt_pointer
        END
        .macro  LEAF leaf, subleaf
        ALONE   "cpuid \leaf \subleaf"
        mov     $\leaf, %eax
        mov     $\subleaf, %ecx
        cpuid
        END
        CASE    "user: cpuid \leaf \subleaf", 0x23, 0x1b, 0x2, .alone
        mov     $\leaf, %eax
        mov     $\subleaf, %ecx
        cpuid
        END
        .code32
        CASE    "32: cpuid \leaf \subleaf", 0x38, 0x10, 0x2, .alone
        mov     $\leaf, %eax
        mov     $\subleaf, %ecx
        cpuid
        END
        .code64
        .endm
        .irp    leaf, 0, 2, 4, 5, 6, 7, 0xa, 0xb, 0xd, 0x14, 0x40000000, 0x40000001, 0x80000000, 0x80000001, 0x80000002, 0x80000004, 0x80000005, 0x80000007, 0x80000008
        LEAF    \leaf, 0
        .endr
        LEAF    4, 1
        LEAF    7, 1

/* Control and model-specific registers. */
        ALONE   "CR0: PG without PE"
        mov     $0x80000000, %eax
        mov     %rax, %cr0
        END
        KERNEL  "CR0: NW without CD"
        mov     $0xa0010033, %eax
        mov     %rax, %cr0
        END
        ALONE   "CR0: PG off in long mode"
        mov     $0x10033, %eax
        mov     %rax, %cr0
        END
        KERNEL  "CR0: upper half"
        mov     $0x180010033, %rax
        mov     %rax, %cr0
        END
        ALONE   "CR4: PAE off in long mode"
        mov     $0x600, %eax
        mov     %rax, %cr4
        END
        ALONE   "CR4: a reserved bit"
        mov     $0x8000620, %eax
        mov     %rax, %cr4
        END
        ALONE   "CR4: VMXE, which is not shown"
        mov     $0x2620, %eax
        mov     %rax, %cr4
        END
        KERNEL  "CR4: PCIDE with PCID in CR3"
        mov     %cr3, %rax
        or      $1, %rax
        mov     %rax, %cr3
        mov     $0x20620, %eax
        mov     %rax, %cr4
        END
        ALONE   "CR3: a reserved bit"
        mov     %cr3, %rax
        mov     %rax, %rbx
        bts     $60, %rax
        mov     %rax, %cr3
        mov     %rbx, %cr3
        END
        KERNEL  "CR8"
        mov     $5, %eax
        mov     %rax, %cr8
        mov     %cr8, %rbx
        xor     %eax, %eax
        mov     %rax, %cr8
        END
        KERNEL  "CR8: too much"
        mov     $16, %eax
        mov     %rax, %cr8
        END
        KERNEL  "CR1"
        .byte   0x0f, 0x20, 0xc8
        END
        KERNEL  "DR7: upper half"
        mov     $1 << 32, %rax
        mov     %rax, %dr7
        END
        KERNEL  "DR4 while CR4.DE"
        mov     $0x628, %eax
        mov     %rax, %cr4
        mov     %db4, %rax
        END
        KERNEL  "lmsw cannot clear PE"
        xor     %eax, %eax
        lmsw    %ax
        mov     %cr0, %rax
        END
        KERNEL  "smsw"
        smsw    %rax
        END
        KERNEL  "EFER: LME off while paging"
        mov     $0xc0000080, %ecx
        mov     $0xc01, %eax
        xor     %edx, %edx
        wrmsr
        END
        KERNEL  "EFER: a reserved bit"
        mov     $0xc0000080, %ecx
        mov     $0x80d01, %eax
        xor     %edx, %edx
        wrmsr
        END
        KERNEL  "FS base that is not canonical"
        mov     $0xc0000100, %ecx
        mov     $0x80000000, %edx
        wrmsr
        END
        KERNEL  "an MSR that nobody has, read"
        mov     $0x12345678, %ecx
        rdmsr
        END
        KERNEL  "an MSR that nobody has, written"
        mov     $0x12345678, %ecx
        wrmsr
        END
        KERNEL  "sysret to an address that is not canonical"
        mov     %r12, %rcx
        mov     $2, %r11d
        sysretq
        END
        KERNEL  "sysret"
        mov     $0xc0000081, %ecx
        xor     %eax, %eax
        mov     $0x00130008, %edx
        wrmsr
        mov     $1f, %ecx
        mov     $0x8d7, %r11d
        sysretq
1:      END
        KERNEL  "syscall"
        mov     $0xc0000081, %ecx
        xor     %eax, %eax
        mov     $0x00130008, %edx
        wrmsr
        mov     $0xc0000082, %ecx
        mov     $1f, %eax
        xor     %edx, %edx
        wrmsr
        mov     $0xc0000084, %ecx
        mov     $0x41, %eax
        wrmsr
        stc
        syscall
        nop
1:      sub     $1b, %rcx
        END
        KERNEL  "syscall while EFER.SCE is 0"
        mov     $0xc0000080, %ecx
        mov     $0xd00, %eax
        xor     %edx, %edx
        wrmsr
        syscall
        END
        KERNEL  "wrmsr of FS base, load through it"
        mov     $0xc0000100, %ecx
        mov     $0x40000000, %eax
        xor     %edx, %edx
        wrmsr
        mov     %fs:0x18, %rbx
        END
        KERNEL  "swapgs"
        mov     $0xc0000102, %ecx
        mov     $0x40000000, %eax
        xor     %edx, %edx
        wrmsr
        swapgs
        mov     %gs:0x18, %rbx
        swapgs
        END

/* Looking at descriptors. */
        .macro  LOOK selector
        KERNEL  "lar \selector"
        mov     $\selector, %ecx
        lar     %ecx, %eax
        END
        KERNEL  "lsl \selector"
        mov     $\selector, %ecx
        lsl     %ecx, %eax
        END
        KERNEL  "verr \selector"
        mov     $\selector, %ecx
        verr    %cx
        END
        KERNEL  "verw \selector"
        mov     $\selector, %ecx
        verw    %cx
        END
        .endm
        LOOK    0x00
        LOOK    0x08
        LOOK    0x1b
        LOOK    0x28
        LOOK    0x48
        LOOK    0x58
        LOOK    0x88
        LOOK    0x90
        LOOK    0x98
        LOOK    0xf00
        KERNEL  "sgdt's limit"
        sgdt    (%rsi)
        movzwl  (%rsi), %eax
        mov     2(%rsi), %rbx
        sub     $gdt, %rbx
        movq    $0, (%rsi)
        movq    $0, 8(%rsi)
        END
        KERNEL  "str, sldt"
        str     %eax
        sldt    %ebx
        END
        KERNEL  "arpl is movslq here"
        movslq  %eax, %rbx
        END

/* Memory that is a device. */
        .macro  DEVICE name, where, first
        .irp    operation, dec, inc, neg, not
        .irp    width, b, l
        KERNEL  "\name: \operation\width"
        \first
        \operation\width \where
        mov     \where, %ebx
        END
        KERNEL  "\name: lock \operation\width"
        \first
        lock \operation\width \where
        mov     \where, %ebx
        END
        .endr
        .endr
        .irp    operation, add, or, and, xor, sub, adc, sbb, cmp
        .irp    width, b, l
        KERNEL  "\name: \operation\width"
        \first
        \operation\width $0x21, \where
        mov     \where, %ebx
        END
        .endr
        .endr
        KERNEL  "\name: lock addl"
        \first
        lock addl $0x21, \where
        mov     \where, %ebx
        END
        KERNEL  "\name: xchg"
        \first
        xchg    %eax, \where
        mov     \where, %ebx
        END
        KERNEL  "\name: xadd"
        \first
        lock xadd %eax, \where
        mov     \where, %ebx
        END
        KERNEL  "\name: cmpxchg, equal"
        \first
        mov     \where, %eax
        mov     $0x37, %ecx
        lock cmpxchg %ecx, \where
        mov     \where, %ebx
        END
        KERNEL  "\name: cmpxchg, not equal"
        \first
        lock cmpxchg %ecx, \where
        mov     \where, %ebx
        END
        KERNEL  "\name: bts"
        \first
        lock btsl $3, \where
        mov     \where, %ebx
        END
        KERNEL  "\name: btc"
        \first
        btcl    $1, \where
        mov     \where, %ebx
        END
        KERNEL  "\name: shl"
        \first
        shll    $1, \where
        mov     \where, %ebx
        END
        KERNEL  "\name: movzb"
        \first
        movzbl  \where, %eax
        END
        KERNEL  "\name: movzw"
        \first
        movzwl  \where, %eax
        END
        KERNEL  "\name: movsx"
        \first
        movslq  \where, %rax
        END
        KERNEL  "\name: test"
        \first
        testl   $0x10, \where
        END
        KERNEL  "\name: push, pop"
        \first
        push    \where
        mov     (%rsp), %eax
        andl    $0xff, (%rsp)
        pop     %rbx
        END
        KERNEL  "\name: movsl from it"
        \first
        lea     \where, %rsi
        movsl
        mov     -4(%rdi), %eax
        END
        KERNEL  "\name: movsl to it"
        \first
        movl    $0x25, (%rsi)
        lea     \where, %rdi
        movsl
        mov     \where, %ebx
        END
        KERNEL  "\name: stosl"
        \first
        lea     \where, %rdi
        stosl
        mov     \where, %ebx
        END
        .endm

        /* The I/O APIC's selector of a register: 8 bits of a word of 32. */
        DEVICE  "I/O APIC", (%r10), "movl $0x12, (%r10)"
        /* The local APIC's task priority: likewise. */
        DEVICE  "local APIC", 0x80(%r9), "movl $0, 0x80(%r9)"
        /* Its divide configuration; and nothing at all, which reads as ones on a PC, and as zeros in QEMU. */
        DEVICE  "nothing", 0x40(%r8), "nop"

        /* Other widths, and strings. */
        .macro  WIDTHS name, where, first
        .irp    operation, decw, decq, incw, incq, notw, notq, negw, negq
        KERNEL  "\name: \operation"
        \first
        \operation \where
        mov     \where, %ebx
        END
        KERNEL  "\name: lock \operation"
        \first
        lock \operation \where
        mov     \where, %ebx
        END
        .endr
        .irp    register, %al, %ax, %rax
        KERNEL  "\name: xchg \register"
        \first
        xchg    \register, \where
        mov     \where, %ebx
        END
        KERNEL  "\name: lock xadd \register"
        \first
        lock xadd \register, \where
        mov     \where, %ebx
        END
        KERNEL  "\name: add \register"
        \first
        add     \register, \where
        mov     \where, %ebx
        END
        KERNEL  "\name: mov \register to it"
        \first
        mov     \register, \where
        mov     \where, %ebx
        END
        KERNEL  "\name: mov \register from it"
        \first
        mov     \where, \register
        END
        .endr
        .irp    operation, lodsb, lodsw, lodsl, lodsq
        KERNEL  "\name: \operation"
        \first
        lea     \where, %rsi
        \operation
        END
        .endr
        .irp    operation, cmpsb, cmpsl, scasb, scasl, stosb, stosw
        KERNEL  "\name: \operation"
        \first
        lea     \where, %rdi
        \operation
        END
        .endr
        KERNEL  "\name: rep movsl from it"
        \first
        lea     \where, %rsi
        mov     $2, %ecx
        rep movsl
        END
        KERNEL  "\name: rep movsb from it"
        \first
        lea     \where, %rsi
        mov     $8, %ecx
        rep movsb
        END
        KERNEL  "\name: rep stosl, downwards", 0x402
        \first
        lea     \where, %rdi
        mov     $1, %ecx
        mov     $0x25, %eax
        rep stosl
        mov     \where, %ebx
        END
        .irp    operation, btl, btsl, btrl
        KERNEL  "\name: \operation 3"
        \first
        \operation $3, \where
        mov     \where, %ebx
        END
        .endr
        KERNEL  "\name: cmovne"
        \first
        test    %eax, %eax
        cmovne  \where, %ebx
        END
        KERNEL  "\name: sarb, rolb"
        \first
        sarb    $1, \where
        rolb    $2, \where
        mov     \where, %ebx
        END
        KERNEL  "\name: imul"
        \first
        imul    \where, %ebx
        END
        KERNEL  "\name: sete"
        \first
        cmp     %eax, %eax
        sete    \where
        mov     \where, %ebx
        END
        KERNEL  "\name: movb of a constant"
        \first
        movb    $0x13, \where
        mov     \where, %ebx
        END
        KERNEL  "\name: movsbl"
        \first
        movsbl  \where, %ebx
        END
        .endm
        WIDTHS  "I/O APIC", (%r10), "movl $0x12, (%r10)"
        WIDTHS  "nothing", 0x40(%r8), "nop"

/* ----------------------------------------------------------------------- exceptions on the way to a handler */

        /* The gate of `vector` gets another byte or word first. */
        .macro  GATE name, vector, store, offset, what
        KERNEL  "\name"
        \store, idt + 16 * \vector + \offset
        \what
        END
        .endm
        .set    TYPE, 5
        .set    SELECTOR, 2
        .set    IST, 4

        GATE    "ud2, its gate not present", 6, "movb $0x0e", TYPE, "ud2"
        GATE    "int3, its gate not present", 3, "movb $0x6e", TYPE, "int3"
        GATE    "int 3, its gate not present", 3, "movb $0x6e", TYPE, ".byte 0xcd, 3"
        GATE    "load DS, not present, nor is #NP's gate", 11, "movb $0x0e", TYPE, "mov $0x48, %eax; mov %eax, %ds"
        GATE    "divide error, its gate not present", 0, "movb $0x0e", TYPE, "xor %ecx, %ecx; div %ecx"
        GATE    "page fault, its gate not present", 14, "movb $0x0e", TYPE, "mov 0x2010(%rsi), %eax"
        GATE    "ud2, a task gate", 6, "movb $0x85", TYPE, "ud2"
        GATE    "ud2, a call gate", 6, "movb $0x8c", TYPE, "ud2"
        GATE    "ud2, a gate of 16 bits", 6, "movb $0x86", TYPE, "ud2"
        GATE    "ud2, a trap gate", 6, "movb $0x8f", TYPE, "ud2"
        GATE    "ud2, a null selector", 6, "movw $0", SELECTOR, "ud2"
        GATE    "ud2, a selector beyond the table", 6, "movw $0xf00", SELECTOR, "ud2"
        GATE    "ud2, a selector of data", 6, "movw $0x10", SELECTOR, "ud2"
        GATE    "ud2, a selector of 32-bit code", 6, "movw $0x38", SELECTOR, "ud2"
        GATE    "ud2, a selector of programs' code", 6, "movw $0x23", SELECTOR, "ud2"
        GATE    "ud2, code that is not present", 6, "movw $0x50", SELECTOR, "ud2"
        GATE    "int 0x91, code that is not present", 0x91, "movw $0x50", SELECTOR, "int $0x91"
        GATE    "page fault, code that is not present", 14, "movw $0x50", SELECTOR, "mov 0x2010(%rsi), %eax"
        GATE    "int 0x91, a handler that is not canonical", 0x91, "movl $0x8000", 8, "int $0x91"

        KERNEL  "page fault, no gate in the table"
        lidt    short_pointer
        mov     0x2010(%rsi), %eax
        END
        KERNEL  "int 0x91, no gate in the table"
        lidt    short_pointer
        int     $0x91
        END
        KERNEL  "int3, the table on a page that is not present"
        lea     0x2000(%rsi), %rax
        movw    $0x1000, (%rsi)
        mov     %rax, 2(%rsi)
        lidt    (%rsi)
        sti
        lidt    idt_pointer
        END

        /* The stack that the handler shall have. */
        .macro  STACK name, store
        KERNEL  "\name"
        movb    $2, idt + 16 * 0x91 + IST
        \store
        int     $0x91
        END
        .endm
        STACK   "int 0x91, IST not canonical", "mov %r12, tss + 44"
        STACK   "int 0x91, IST on a page that is not present", "lea 0x2100(%rsi), %rax; mov %rax, tss + 44"
        STACK   "int 0x91, IST on a page that is read only", "lea 0x1100(%rsi), %rax; mov %rax, tss + 44"
        STACK   "int 0x91, IST that is not aligned", "lea 0x10d(%rsi), %rax; mov %rax, tss + 44"
        STACK   "int 0x91, IST across the end", "lea 0x9010(%rsi), %rax; mov %rax, tss + 44"
        STACK   "int 0x91, IST beyond the end of the TSS", "movw $0x2b, gdt + 0x28; movb $0x89, gdt + 0x2d; mov $0x28, %eax; ltr %ax"
        KERNEL  "ud2, IST on a page that is not present"
        movb    $2, idt + 16 * 6 + IST
        lea     0x2100(%rsi), %rax
        mov     %rax, tss + 44
        ud2
        END
        USER    "user: int 0x81, no IST"
        movb    $0, idt + 16 * 0x81 + IST
        int     $0x81
        END
        USER    "user: int 0x81, no IST, RSP0 not canonical"
        movb    $0, idt + 16 * 0x81 + IST
        mov     %r12, tss + 4
        int     $0x81
        END
        USER    "user: int 0x81, no IST, RSP0 beyond a page"
        movb    $0, idt + 16 * 0x81 + IST
        lea     0x9010(%rsi), %rax
        mov     %rax, tss + 4
        int     $0x81
        END
        USER    "user: page fault, no IST, RSP0 beyond a page"
        movb    $0, idt + 16 * 14 + IST
        lea     0x9010(%rsi), %rax
        mov     %rax, tss + 4
        movb    $1, idt + 16 * 8 + IST
        mov     (%rsi), %eax
        END
        KERNEL  "int 0x91, no IST: the same stack"
        movb    $0, idt + 16 * 0x91 + IST
        lea     0x808(%rsi), %rsp
        int     $0x91
        END

/* How often a handler runs, and where it goes on. */
        .macro  COUNT name, skip, pushes, what
        KERNEL  "counted: \name"
        mov     $\skip, %r14d
        mov     $\pushes, %r13d
        lidt    counting_pointer
        \what
        lidt    idt_pointer
        END
        .endm
        COUNT   "ud2", 2, 0, "ud2"
        COUNT   "ud2, three times", 2, 0, "ud2; ud2; ud2"
        COUNT   "int3", 0, 0, "int3"
        COUNT   "int 3", 0, 0, ".byte 0xcd, 3"
        COUNT   "int 0x40", 0, 0, "int $0x40"
        COUNT   "divide error", 2, 0, "xor %ebx, %ebx; div %ebx"
        COUNT   "page fault, read", 6, 1, "mov 0x2010(%rsi), %eax"
        COUNT   "page fault, write", 6, 1, "mov %eax, 0x2010(%rsi)"
        COUNT   "page fault, dec", 6, 1, "decl 0x2010(%rsi)"
        COUNT   "page fault, lock dec", 7, 1, "lock decl 0x2010(%rsi)"
        COUNT   "page fault, push", 6, 1, "push 0x2010(%rsi)"
        COUNT   "page fault across the end", 6, 1, "mov %eax, 0x8ffe(%rsi)"
        COUNT   "not present", 2, 1, "mov $0x48, %eax; mov %eax, %ds"
        COUNT   "stack not present", 2, 1, "mov $0x48, %eax; mov %eax, %ss"
        COUNT   "protection", 3, 1, "mov (%r12), %rax; nop"
        COUNT   "x87 while CR0.TS", 2, 0, "mov %cr0, %rax; or $8, %rax; mov %rax, %cr0; fld1"
        COUNT   "vmcall of a guest that has none", 3, 0, ".byte 0x0f, 1, 0xc4"
        COUNT   "wrmsr, FS base not canonical", 2, 1, "mov $0xc0000100, %ecx; mov $0x80000000, %edx; wrmsr"
        COUNT   "MOV to CR8, too much", 4, 1, "mov $16, %eax; mov %rax, %cr8"
        COUNT   "single steps", 0, 0, "pushf; orl $0x100, (%rsp); popf; nop; nop; nop; pushf; andl $~0x100, (%rsp); popf"
        KERNEL  "counted: rep movsb faults in its middle, and goes on"
        mov     $2, %r14d
        mov     $1, %r13d
        lea     0x8ff8(%rsi), %rdi
        mov     $16, %ecx
        lidt    counting_pointer
        rep movsb
        lidt    idt_pointer
        END

/* Debug registers, and steps. */
        .macro  WATCH name, dr7, where, what
        KERNEL  "\name"
        lea     \where, %rax
        mov     %rax, %dr0
        mov     $\dr7, %eax
        mov     %rax, %dr7
        \what
1:      nop
        nop
        END
        .endm
        WATCH   "DR7: code", 0x2, 1f(%rip), "nop"
        WATCH   "DR7: code that is not reached", 0x2, 1f(%rip), "int $0x80; nop"
        WATCH   "DR7: a write", 0x000d0002, 0x10(%rsi), "mov %eax, 0x10(%rsi)"
        WATCH   "DR7: a write beside it", 0x000d0002, 0x10(%rsi), "mov %eax, 0x14(%rsi)"
        WATCH   "DR7: a write in its middle", 0x000d0002, 0x10(%rsi), "mov %al, 0x12(%rsi)"
        WATCH   "DR7: a read, where writes are watched", 0x000d0002, 0x10(%rsi), "mov 0x10(%rsi), %eax"
        WATCH   "DR7: a read", 0x000f0002, 0x10(%rsi), "mov 0x10(%rsi), %eax"
        WATCH   "DR7: push", 0x000d0002, -8(%rsp), "push %rcx"
        WATCH   "DR7: general detect", 0x2000, 0x10(%rsi), "mov %dr0, %rbx"

        KERNEL  "single step: mov ss", 0x102
        mov     %ss, %eax
        END
        KERNEL  "single step: behind mov ss"
        mov     %ss, %eax
        pushf
        orl     $0x100, (%rsp)
        popf
        mov     %eax, %ss
        nop
        END
        KERNEL  "single step: rep movsb", 0x102
        rep movsb
        END
        KERNEL  "single step: int 0x91", 0x102
        int     $0x91
        END
        KERNEL  "single step: jmp", 0x102
        jmp     1f
        nop
1:      END
        KERNEL  "single step: ud2", 0x102
        ud2
        END
        KERNEL  "single step: cpuid", 0x102
        cpuid
        END
        KERNEL  "single step: out", 0x102
        out     %al, $0x80
        END
        KERNEL  "single step: write to a device", 0x102
        movl    $0x12, (%r10)
        END
        KERNEL  "single step: iret sets TF"
        pushq   $0x10
        pushq   $case_stack_top
        pushq   $0x102
        pushq   $0x08
        pushq   $1f
        iretq
1:      nop
        nop
        END
        USER    "user: single step", 0x102
        nop
        END

/* The local APIC sends to itself; the handler is entered when the guest takes it. */
        .macro  SEND vector
        movl    $0x44000 + \vector, 0x300(%r9)
        .endm
        .macro  INTERRUPT name, flags, what
        KERNEL  "interrupt: \name", \flags
        \what
        END
        .endm
        INTERRUPT "behind sti", 0x2, "SEND 0xa1; sti; nop; nop"
        INTERRUPT "behind two sti", 0x2, "SEND 0xa1; sti; sti; nop; nop"
        INTERRUPT "sti, jump", 0x2, "SEND 0xa1; sti; jmp 1f; nop; 1: nop"
        INTERRUPT "sti, mov ss", 0x2, "mov %ss, %eax; SEND 0xa1; sti; mov %eax, %ss; nop; nop"
        INTERRUPT "sti, ud2", 0x2, "SEND 0xa1; sti; ud2"
        INTERRUPT "sti, hlt", 0x2, "SEND 0xa1; sti; hlt; nop"
        INTERRUPT "sti, read of a device", 0x2, "SEND 0xa1; movl $0x12, (%r10); sti; mov (%r10), %ebx; nop"
        INTERRUPT "popf", 0x2, "SEND 0xa1; pushq $0x202; popfq; nop; nop"
        INTERRUPT "the higher of two", 0x2, "SEND 0x91 + 0x10; SEND 0xb1; sti; nop; nop"
        INTERRUPT "the lower of two", 0x2, "sti; nop; nop"
        INTERRUPT "CR8 keeps it back", 0x2, "mov $0xa, %eax; mov %rax, %cr8; SEND 0xa1; sti; nop; nop; cli; xor %eax, %eax; mov %rax, %cr8"
        INTERRUPT "and lets it come", 0x2, "sti; nop; nop"
        INTERRUPT "MOV to CR8 lets it come", 0x2, "mov $0xa, %eax; mov %rax, %cr8; SEND 0xa1; sti; nop; nop; xor %eax, %eax; mov %rax, %cr8; nop; nop"
        KERNEL  "interrupt: iret to it"
        SEND    0xa1
        pushq   $0x10
        pushq   $case_stack_top
        pushq   $0x202
        pushq   $0x08
        pushq   $1f
        iretq
1:      nop
        nop
        END
        KERNEL  "interrupt: iret to CPL 3"
        SEND    0xa1
        pushq   $0x1b
        pushq   $case_stack_top
        pushq   $0x202
        pushq   $0x23
        pushq   $1f
        iretq
1:      nop
        nop
        END
        KERNEL  "interrupt: sysret to CPL 3"
        SEND    0xa1
        mov     $0xc0000081, %ecx
        xor     %eax, %eax
        mov     $0x00130008, %edx
        wrmsr
        mov     $1f, %ecx
        mov     $0x202, %r11d
        sysretq
1:      nop
        END
        KERNEL  "interrupt: its gate is not present"
        SEND    0x90
        sti
        nop
        nop
        END
        KERNEL  "interrupt: while it waits"
        SEND    0xa1
1:      sti
        jmp     1b
        KERNEL  "interrupt: NMI"
        movl    $0x400, 0x300(%r9)
1:      jmp     1b
        KERNEL  "interrupt: NMI, and another behind IRET"
        xor     %r14d, %r14d
        xor     %r13d, %r13d
        lidt    counting_pointer
        movl    $0x400, 0x300(%r9)
1:      test    %r15, %r15
        jz      1b
        movl    $0x400, 0x300(%r9)
1:      cmp     $2, %r15
        jne     1b
        lidt    idt_pointer
        END
        KERNEL  "interrupt: the timer wakes from hlt"
        movl    $0xb, 0x3e0(%r9)
        movl    $0xa1, 0x320(%r9)
        movl    $100000, 0x380(%r9)
        sti
        hlt
        nop
        END
        KERNEL  "interrupt: the timer, one shot"
        mov     0x390(%r9), %ebx
        movl    $0x10000, 0x320(%r9)
        END

/* More of transfers between privileges. */
        .macro  IRET name, cs, ss, flags, rip=1f
        KERNEL  "\name"
        pushq   $\ss
        pushq   $case_stack_top
        pushq   $\flags
        pushq   $\cs
        pushq   $\rip
        iretq
1:      END
        .endm
        IRET    "iret to CPL 3", 0x23, 0x1b, 0x2
        IRET    "iret to CPL 3, IOPL 3 and IF", 0x23, 0x1b, 0x3002
        IRET    "iret to CPL 3, SS of the kernel", 0x23, 0x10, 0x2
        IRET    "iret to CPL 3, SS null", 0x23, 0, 0x2
        IRET    "iret to data", 0x10, 0x10, 0x2
        IRET    "iret to null", 0, 0x10, 0x2
        IRET    "iret beyond the table", 0xf00, 0x10, 0x2
        IRET    "iret to code that is not present", 0x50, 0x10, 0x2
        IRET    "iret to programs' code with RPL 0", 0x20, 0x18, 0x2
        IRET    "iret to a TSS", 0x28, 0x10, 0x2
        KERNEL  "sysretl"
        mov     $0xc0000081, %ecx
        xor     %eax, %eax
        mov     $0x00330008, %edx
        wrmsr
        mov     $1f, %ecx
        mov     $0x2, %r11d
        sysretl
        .code32
1:      END
        KERNEL  "sysret while EFER.SCE is 0"
        mov     $0xc0000080, %ecx
        mov     $0xd00, %eax
        xor     %edx, %edx
        wrmsr
        sysretq
        END
        KERNEL  "syscall to an address that is not canonical"
        mov     $0xc0000082, %ecx
        xor     %eax, %eax
        mov     $0x80000000, %edx
        wrmsr
        END
        KERNEL  "alignment check at CPL 3"
        mov     %cr0, %rax
        or      $0x40000, %rax
        mov     %rax, %cr0
        pushq   $0x1b
        pushq   $case_stack_top
        pushq   $0x40002
        pushq   $0x23
        pushq   $1f
        iretq
1:      mov     0x3001(%rsi), %eax
        END
        KERNEL  "alignment check does not concern the kernel", 0x40002
        mov     %cr0, %rax
        or      $0x40000, %rax
        mov     %rax, %cr0
        mov     1(%rsi), %eax
        END

/* With what is shown to guests that are not in compatibility mode: the image is the kernel's alone then. */
        .macro  PROTECTED name, cr4, what
        SHOWN   "\name"
        movb    $0x83, pd0
        mov     %cr3, %rax
        mov     %rax, %cr3
        mov     $0x620 | \cr4, %eax
        mov     %rax, %cr4
        \what
        END
        .endm
        .set    SMEP, 1 << 20
        .set    SMAP, 1 << 21
        PROTECTED "SMEP: run programs' page", SMEP, "lea 0x3010(%rsi), %rax; call *%rax"
        PROTECTED "SMEP: read programs' page", SMEP, "mov 0x3010(%rsi), %rax"
        PROTECTED "SMAP: read", SMAP, "mov 0x3010(%rsi), %rax"
        PROTECTED "SMAP: write", SMAP, "mov %rax, 0x3010(%rsi)"
        PROTECTED "SMAP: add", SMAP, "lock add %rax, 0x3010(%rsi)"
        PROTECTED "SMAP: rep movsb", SMAP, "lea 0x3010(%rsi), %rdi; rep movsb"
        PROTECTED "SMAP: push", SMAP, "lea 0x3010(%rsi), %rsp; push %rax"
        PROTECTED "SMAP: read after stac", SMAP, "stac; mov 0x3010(%rsi), %rax; clac"
        PROTECTED "SMAP: read after stac, clac", SMAP, "stac; clac; mov 0x3010(%rsi), %rax"
        PROTECTED "SMAP: read only, after stac", SMAP, "stac; mov %rax, 0x4010(%rsi); clac"
        PROTECTED "SMAP: popf lets it read", SMAP, "pushq $0x40002; popfq; mov 0x3010(%rsi), %rbx"
        PROTECTED "SMAP: a descriptor, after stac", SMAP, "stac; movabs $0x40008200300000ff, %rbx; mov %rbx, gdt + 0x78; mov $0x78, %eax; lldt %ax; mov $0x0c, %eax; mov %eax, %es"
        PROTECTED "SMAP: the handler's stack, after stac", SMAP, "stac; movb $2, idt + 16 * 0x91 + IST; lea 0x3100(%rsi), %rax; mov %rax, tss + 44; int $0x91"
        PROTECTED "SMAP: int 0x91, after stac", SMAP, "stac; int $0x91"
        PROTECTED "SMAP: invlpg", SMAP, "invlpg 0x3010(%rsi)"
        SHOWN   "rdfsbase while CR4.FSGSBASE is 0"
        rdfsbase %rax
        END
        SHOWN   "wrfsbase, not canonical"
        mov     $0x10620, %eax
        mov     %rax, %cr4
        wrfsbase %r12
        END

/* Flags and numbers. */
        .macro  SHIFT operation
        .irp    count, 0, 1, 5, 31, 32, 63
        KERNEL  "\operation %eax by \count"
        mov     $\count, %ecx
        \operation %cl, %eax
        END
        KERNEL  "\operation %rax by \count"
        mov     $\count, %ecx
        \operation %cl, %rax
        END
        KERNEL  "\operation %al by \count"
        mov     $\count, %ecx
        \operation %cl, %al
        END
        .endr
        .endm
        SHIFT   shl
        SHIFT   shr
        SHIFT   sar
        SHIFT   rol
        SHIFT   ror
        SHIFT   rcl
        SHIFT   rcr
        .irp    count, 0, 1, 17, 33
        KERNEL  "shld by \count"
        mov     $\count, %ecx
        shld    %cl, %rbx, %rax
        END
        KERNEL  "shrd by \count"
        mov     $\count, %ecx
        shrd    %cl, %ebx, %eax
        END
        .endr
        .irp    operation, "mul %rbx", "imul %rbx", "imul %ebx, %eax", "imul $-3, %rbx, %rax", "bsf %rax, %rbx", "bsr %rax, %rbx"
        ONE     \operation
        .endr
        .irp    operation, "bt $70, %rax", "bts %rcx, %rax", "btr $4, %eax", "bt %rax, (%rdi)", "bts %ecx, (%rsi)"
        KERNEL  "\operation"
        and     $0x7f, %eax
        \operation
        END
        .endr
        KERNEL  "bsf of zero"
        xor     %eax, %eax
        bsf     %eax, %ebx
        END
        KERNEL  "cmpxchg8b, equal"
        mov     (%rsi), %eax
        mov     4(%rsi), %edx
        lock cmpxchg8b (%rsi)
        END
        KERNEL  "cmpxchg8b, not equal"
        lock cmpxchg8b (%rsi)
        END
        KERNEL  "cmpxchg16b, equal"
        mov     (%rsi), %rax
        mov     8(%rsi), %rdx
        lock cmpxchg16b (%rsi)
        END
        KERNEL  "cmpxchg16b, not aligned"
        lock cmpxchg16b 8(%rsi)
        END
        KERNEL  "bswap"
        bswap   %rax
        bswap   %ecx
        END
        KERNEL  "xlat"
        mov     %rsi, %rbx
        mov     $9, %al
        xlatb
        END
        KERNEL  "enter 16, 2"
        mov     %rsp, %rbx
        enter   $16, $2
        sub     %rsp, %rbx
        END
        KERNEL  "leave"
        mov     %rsp, %rbp
        push    $7
        leave
        sub     $case_stack_top, %rsp
        mov     %rsp, %rax
        END
        KERNEL  "pushfq, popfq of all"
        movq    $0x3f7fd7, (%rsi)
        andq    $~0x14300, (%rsi)
        push    (%rsi)
        popfq
        pushfq
        pop     %rax
        END
        USER    "user: popf cannot set IF or IOPL"
        pushq   $0x3202
        popfq
        pushfq
        pop     %rax
        END
        KERNEL  "lahf, sahf"
        mov     $0xd5, %ah
        sahf
        lahf
        END
        KERNEL  "std, lodsq", 0x402
        lodsq
        END
        KERNEL  "loop"
        xor     %eax, %eax
1:      inc     %eax
        loop    1b
        END
        KERNEL  "jrcxz"
        xor     %ecx, %ecx
        jrcxz   1f
        ud2
1:      END
        KERNEL  "cmov reads though it does not move"
        cmp     %eax, %eax
        cmovne  0x2000(%rsi), %rax
        END
        KERNEL  "cwd and its like"
        cwtl
        cltd
        END
        KERNEL  "x87: 1/3"
        fld1
        fldpi
        fdivrp
        fstpt   (%rsi)
        END
        KERNEL  "sse2: addpd"
        movups  (%rsi), %xmm0
        addpd   (%rdi), %xmm0
        movups  %xmm0, (%rsi)
        END
        KERNEL  "fxsave's x87 pointers"
        fld1
        fxsave  (%rsi)
        movzwl  (%rsi), %eax
        movzwl  2(%rsi), %ebx
        movzbl  4(%rsi), %ecx
        lea     512(%rsi), %rdx
1:      movq    $0, (%rsi)
        add     $8, %rsi
        cmp     %rsi, %rdx
        jne     1b
        END

        .macro  X87 name, what
        KERNEL  "x87: \name"
        \what
        fnstsw  %ax
        movzwl  %ax, %ebx
        xor     %eax, %eax
        fstpt   (%rsi)
        END
        .endm
        X87     "2 * pi", "fldpi; fadd %st, %st"
        X87     "square root of 2", "fld1; fadd %st, %st; fsqrt"
        X87     "sine of 1", "fld1; fsin"
        X87     "tangent of 1", "fld1; fptan; fstp %st"
        X87     "arctangent of 1", "fld1; fld1; fpatan"
        X87     "2^x - 1", "fldln2; f2xm1"
        X87     "logarithm of pi", "fld1; fldpi; fyl2x"
        X87     "remainder", "fld1; fldpi; fprem"
        X87     "IEEE remainder", "fld1; fldpi; fprem1"
        X87     "rounded to an integer", "fldpi; frndint"
        X87     "scaled", "fldpi; fldpi; fscale"
        X87     "exponent", "fldpi; fxtract"
        X87     "0/0", "fldz; fldz; fdivp"
        X87     "1/0", "fld1; fldz; fdivrp"
        X87     "stack underflow", "fxch %st(1)"
        X87     "stack overflow", "fld1; fld1; fld1; fld1; fld1; fld1; fld1; fld1; fld1"
        X87     "compare", "fld1; fldpi; fcom"
        X87     "unordered", "fldz; fldz; fdivp; fld1; fucom"
        X87     "examined", "fldz; fchs; fxam"
        X87     "a float", "flds 0x40(%rdi)"
        X87     "a double", "fldl 0x40(%rdi)"
        X87     "an integer", "fildll 0x40(%rdi)"
        X87     "packed decimal", "fbld 0x40(%rdi)"
        X87     "too large an integer", "fldl2t; fldl2t; fldl2t; fscale; fistpl 0x10(%rsi); fldz"
        KERNEL  "x87: fcomi"
        fld1
        fldpi
        fcomip
        END
        KERNEL  "x87: packed decimal out"
        fldpi
        fbstp   (%rsi)
        END
        KERNEL  "x87: fnstenv"
        fldcw   fault_all
        fld1
        fnstenv (%rsi)
        mov     (%rsi), %eax
        mov     8(%rsi), %ebx
        END
        .macro  SSE name, what
        KERNEL  "sse: \name"
        movups  (%rsi), %xmm0
        movups  0x20(%rdi), %xmm1
        \what
        movups  %xmm0, (%rsi)
        END
        .endm
        .irp    operation, addps, subps, mulps, divps, minps, maxps, sqrtps, rcpss, addsd, mulsd, divsd, sqrtsd, minsd, maxpd, andnps, xorps, unpcklps, unpckhpd, cvtdq2pd, cvtps2pd, cvtpd2ps, cvttps2dq, cvtsd2ss, paddb, paddusw, psubsw, pmullw, pmulhuw, pmaddwd, psadbw, pavgb, pcmpeqb, pcmpgtw, packsswb, packuswb, punpcklbw, psllw, psrad, psrlq, pmaxub, pminsw
        SSE     "\operation", "\operation %xmm1, %xmm0"
        .endr
        SSE     "shufps", "shufps $0x4e, %xmm1, %xmm0"
        SSE     "pshufd", "pshufd $0x1b, %xmm1, %xmm0"
        SSE     "pshuflw", "pshuflw $0x1b, %xmm1, %xmm0"
        SSE     "pslldq", "pslldq $3, %xmm0"
        SSE     "cmpltps", "cmpltps %xmm1, %xmm0"
        SSE     "cmpunordpd", "cmpunordpd %xmm1, %xmm0"
        SSE     "comisd", "comisd %xmm1, %xmm0"
        SSE     "ucomiss", "ucomiss %xmm1, %xmm0"
        SSE     "movmskps", "movmskps %xmm0, %eax"
        SSE     "pmovmskb", "pmovmskb %xmm1, %eax"
        SSE     "cvttsd2si", "cvttsd2si %xmm1, %rax"
        SSE     "cvtsi2sd", "cvtsi2sd %rbx, %xmm0"
        SSE     "cvtss2si", "cvtss2si %xmm1, %eax"
        SSE     "pinsrw", "pinsrw $3, %ebx, %xmm0"
        SSE     "pextrw", "pextrw $5, %xmm1, %eax"
        SSE     "movhlps", "movhlps %xmm1, %xmm0"
        SSE     "movss clears", "movss 0x40(%rdi), %xmm0"
        SSE     "movsd between registers", "movsd %xmm1, %xmm0"
        SSE     "movnti", "movnti %rax, 0x10(%rsi)"
        SSE     "maskmovdqu", "maskmovdqu %xmm1, %xmm0"
        SSE     "addsubps", "addsubps %xmm1, %xmm0"
        SSE     "haddpd", "haddpd %xmm1, %xmm0"
        SSE     "lddqu", "lddqu 7(%rdi), %xmm0"
        SSE     "a constant of MXCSR that is reserved", "movl $0x10000, (%rsi); ldmxcsr (%rsi)"
        KERNEL  "mmx: paddw"
        movq    (%rsi), %mm0
        paddw   0x40(%rdi), %mm0
        movq    %mm0, (%rsi)
        emms
        END
        KERNEL  "fxrstor, MXCSR reserved"
        movl    $0xffff0000, 24(%rsi)
        fxrstor (%rsi)
        END

/* Interrupts. */
        KERNEL  "sti, then cli: nothing comes between"
        sti
        cli
        END
        KERNEL  "code that changes itself"
        lea     1f(%rip), %rbx
        movb    $0x42, 1(%rbx)
        jmp     1f
1:      mov     $0x41, %al
        movb    $0x41, 1(%rbx)
        END
        KERNEL  "code that changes what comes next"
        lea     1f(%rip), %rbx
        movb    $0x43, 1(%rbx)
1:      mov     $0x41, %al
        movb    $0x41, 1(%rbx)
        END

        .code64
        .globl  gate_target
gate_target:
        mov     $0x600d, %eax
        END

        .data
        .balign 4
fault_all:
        .word   0x340
        .balign 4
sse_fault_all:
        .long   0x0

        .section .note.GNU-stack, "", @progbits
