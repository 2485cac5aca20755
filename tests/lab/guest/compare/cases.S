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

        /* What TCG cannot do, so that there is nothing to compare with: run with the word `alone` on the command line. */
        .macro  ALONE name, flags=0x2
        .code64
        CASE    "\name", 0x08, 0x10, \flags, .alone
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
        KERNEL  "int1"
        .byte   0xf1
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
        USER    "user: alignment check", 0x2
        mov     1(%rdi), %eax
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
