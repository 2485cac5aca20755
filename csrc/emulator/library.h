/* SPDX-License-Identifier: MIT
 *
 * The CPU emulator library (Unicorn 2.1.4), as far as the engine uses it.
 *
 * It is opened at run time, so nothing of it is needed to build pyhv or to run it on KVM. What is declared here is its
 * public interface (its headers uc.h and x86.h), and the layout of its CPU state, which is none of its interface:
 * pyhv_emulator_open() compares that with the library in hand before anything relies on it.
 */
#ifndef PYHV_EMULATOR_LIBRARY_H
#define PYHV_EMULATOR_LIBRARY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "pyhv.h"

/* uc_version(): major, minor, patch, and 255 for a release. */
#define LIBRARY_VERSION 0x020104ffu

enum { UC_ARCH_X86 = 4, UC_MODE_64 = 8 };
enum { UC_CPU_X86_QEMU64 = 0 };
enum { UC_PROT_ALL = 7 };

enum {
    UC_ERR_OK = 0,
    UC_ERR_READ_UNMAPPED = 6,
    UC_ERR_WRITE_UNMAPPED = 7,
    UC_ERR_FETCH_UNMAPPED = 8,
    UC_ERR_INSN_INVALID = 10,
    UC_ERR_FETCH_PROT = 14,
};

enum { UC_HOOK_INTR = 1 << 0, UC_HOOK_INSN = 1 << 1 };
enum {
    UC_X86_INS_CPUID = 113,
    UC_X86_INS_IN = 218,
    UC_X86_INS_OUT = 500,
    UC_X86_INS_RDTSC = 608,
    UC_X86_INS_RDTSCP = 609,
    UC_X86_INS_SYSCALL = 699,
    UC_X86_INS_SYSENTER = 700,
};

/* uc_ctl()'s requests: number, count of arguments at bit 26, 1 at bit 30 to write. */
#define UC_CTL_WRITE(number, count) ((int)((number) | (count) << 26 | 1u << 30))
#define UC_CTL_USE_EXITS            UC_CTL_WRITE(4u, 1u)
#define UC_CTL_CPU_MODEL            UC_CTL_WRITE(7u, 1u)
#define UC_CTL_FLUSH_BLOCKS         UC_CTL_WRITE(10u, 0u)
#define UC_CTL_FLUSH_TLB            UC_CTL_WRITE(11u, 0u)
#define UC_CTL_CODE_BUFFER          UC_CTL_WRITE(13u, 1u)

typedef struct uc_struct uc_engine;
typedef size_t uc_hook;

struct uc_x86_mmr {
    uint16_t selector;
    uint64_t base;
    uint32_t limit;
    uint32_t flags;
};

struct uc_x86_msr {
    uint32_t rid;
    uint64_t value;
};

/* ------------------------------------------------------------------------------------------ its CPU state -- */

struct cpu_segment { /* flags: the descriptor's second word */
    uint32_t selector;
    uint64_t base;
    uint32_t limit;
    uint32_t flags;
};

enum { ES, CS, SS, DS, FS, GS, SEGMENTS };
enum { RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI };

/* While it executes, the arithmetic flags and DF are kept apart, in cc_* and df; UC_X86_REG_RFLAGS puts them together. */
struct cpu_state {
    uint64_t regs[16];
    uint64_t rip;
    uint64_t rflags;
    uint64_t cc_dst, cc_src, cc_src2;
    uint32_t cc_op;
    int32_t df;
    uint32_t hflags, hflags2;
    struct cpu_segment segs[SEGMENTS], ldt, tr, gdt, idt;
    uint64_t cr[9];
    uint32_t a20_mask;
    uint8_t bounds[88]; /* MPX, which no guest is shown */
    uint64_t efer;
    uint32_t start_init_save;
    uint32_t fpstt;
    uint16_t fpus, fpuc;
    uint8_t fptags[8]; /* 1: empty */
    struct {
        uint64_t mantissa;
        uint16_t exponent;
        uint8_t reserved[6];
    } fpregs[8];              /* by number, not by place on the stack */
    uint8_t float_status[64]; /* follows from fpuc and mxcsr: see pyhv_emulator_vcpu_set_xsave() */
    uint32_t mxcsr;
    uint32_t before_xmm;
    struct {
        uint64_t low, high, upper[6];
    } xmm[32];
    uint8_t wide_vectors[1928];
    uint32_t sysenter_cs;
    uint32_t reserved0;
    uint64_t sysenter_esp, sysenter_eip;
    uint64_t star, vm_hsave, lstar, cstar, fmask, kernel_gs_base;
    uint64_t tsc, tsc_adjust, tsc_deadline, tsc_aux;
    uint64_t xcr0;
    uint64_t mcg_status, misc_enable;
    uint8_t counters[352];
    uint64_t pat;
    uint8_t reserved1[96];
    int32_t error_code;
    int32_t exception_is_int;
    uint64_t exception_next_rip;
    uint64_t dr[8];
    uint64_t breakpoints[4];
    int32_t old_exception;
    uint8_t svm[56];
    uint8_t task_priority;
    uint8_t reserved2[3];
    uint64_t retaddr;
};

/* What stands behind that part, which a saved context ends with. A context whose size is set by hand has it too. */
struct cpu_identity {
    uint32_t reserved[12];
    uint32_t vendor[3];
    uint32_t version;
    /* CPUID words: what the translator takes for an instruction, and what for #UD, depends on them. */
    struct {
        uint64_t leaf1_edx, leaf1_ecx, leaf7_ebx, leaf7_ecx, leaf7_edx, leaf7_1_eax, extended_edx, extended_ecx;
    } features;
};

/* struct uc_context. */
struct cpu_context {
    uint64_t size; /* of what follows the head */
    uint8_t head[32];
    struct cpu_state state;
    struct cpu_identity identity;
};
#define CONTEXT_HEAD offsetof(struct cpu_context, state)

/* Bits of hflags. */
enum {
    HF_CPL = 3,
    HF_INHIBIT_IRQ = 1 << 3,
    HF_CS32 = 1 << 4,
    HF_SS32 = 1 << 5,
    HF_ADDSEG = 1 << 6,
    HF_PE = 1 << 7,
    HF_MP_SHIFT = 9, /* MP, EM, TS, as in CR0 from bit 1 on */
    HF_EM = 1 << 10,
    HF_TS = 1 << 11,
    HF_LMA = 1 << 14,
    HF_CS64 = 1 << 15,
    HF_OSFXSR = 1 << 22,
    HF_SMAP = 1 << 23,
};
enum {
    HF2_NMI = 1 << 2,
    /* CR8 reads as it was written; else as the library's own local APIC says, which is none. */
    HF2_OWN_PRIORITY = 1 << 3,
};
enum { CC_OP_EFLAGS = 1 }; /* the arithmetic flags are in cc_src */

/* ------------------------------------------------------------------------------------------ its functions -- */

/* Register numbers (enum uc_x86_reg). */
enum {
    UC_X86_REG_CS = 11,
    UC_X86_REG_RAX = 35,
    UC_X86_REG_RBX = 37,
    UC_X86_REG_RCX = 38,
    UC_X86_REG_RDX = 40,
    UC_X86_REG_RIP = 41,
    UC_X86_REG_RSI = 43,
    UC_X86_REG_RSP = 44,
    UC_X86_REG_CR2 = 52,
    UC_X86_REG_CR4 = 54,
    UC_X86_REG_CR8 = 58,
    UC_X86_REG_DR0 = 66,
    UC_X86_REG_FP1 = 83,
    UC_X86_REG_R15 = 113,
    UC_X86_REG_XMM1 = 123,
    UC_X86_REG_GDTR = 243,
    UC_X86_REG_TR = 245,
    UC_X86_REG_FPCW = 246,
    UC_X86_REG_MSR = 248,
    UC_X86_REG_MXCSR = 249,
    UC_X86_REG_RFLAGS = 253,
};

struct library {
    unsigned (*version)(unsigned *major, unsigned *minor);
    int (*open)(int arch, int mode, uc_engine **engine);
    int (*close)(uc_engine *engine);
    const char *(*strerror)(int code);
    int (*ctl)(uc_engine *engine, int control, ...);
    int (*emu_start)(uc_engine *engine, uint64_t begin, uint64_t until, uint64_t timeout, size_t count);
    int (*emu_stop)(uc_engine *engine);
    int (*reg_read)(uc_engine *engine, int number, void *value);
    int (*reg_write)(uc_engine *engine, int number, const void *value);
    int (*mem_map_ptr)(uc_engine *engine, uint64_t address, uint64_t size, uint32_t perms, void *host);
    int (*mmio_map)(uc_engine *engine, uint64_t address, uint64_t size,
                    uint64_t (*read)(uc_engine *, uint64_t offset, unsigned size, void *opaque), void *read_opaque,
                    void (*write)(uc_engine *, uint64_t offset, unsigned size, uint64_t value, void *opaque),
                    void *write_opaque);
    int (*mem_write)(uc_engine *engine, uint64_t address, const void *bytes, uint64_t size);
    int (*hook_add)(uc_engine *engine, uc_hook *hook, int type, void *callback, void *opaque, uint64_t begin,
                    uint64_t end, ...);
    int (*context_alloc)(uc_engine *engine, void **context);
    int (*context_save)(uc_engine *engine, void *context);
    int (*context_restore)(uc_engine *engine, void *context);
    int (*context_free)(void *context);
    size_t (*context_size)(uc_engine *engine);
};

/* Filled by pyhv_emulator_open(). */
extern struct library uc;

/* When a run of the engine may be stopped. As the library comes, it looks after every access to memory whether it has
 * been asked to stop, and leaves with RIP on the instruction that made the access. Where it was asked by a signal an
 * instruction that reads, changes and writes memory is so executed twice. A switch of its own (uc->no_exit_request; it
 * is for ARM's conditional instructions) takes those looks out of what it translates from then on; the one at the
 * beginning of each block stays.
 *
 * precise: stop between blocks only. Else at once, which only single steps need. What was translated is forgotten. */
void pyhv_library_stop_between_blocks(uc_engine *engine, int precise);

/* Who decides, between two blocks of the guest's code, whether the engine goes on. `leave` is called on the engine's thread
 * before its first block, whenever an instruction ends its block for the processor to look at interrupts (STI, POPF,
 * IRET, SYSRET, MOV to CR8 ...; behind the shadow of STI and MOV SS), and after pyhv_library_look(). All registers but the
 * arithmetic flags are up to date then. Where it says true nothing more is executed, and uc_emu_start() returns.
 *
 * uc_emu_stop() is not used: what it sets can be taken back by the library, in the middle of a block callbacks (of
 * RDTSC, SYSCALL ...) are passed over from then on, and a signal handler that calls it races with callbacks that do. */
struct library_stop {
    bool (*leave)(void *opaque);
    void *opaque;
};
void pyhv_library_decide(uc_engine *engine, struct library_stop *stop);

/* Lets stop->leave() be called at the end of the block that the engine executes; before the first one, if it executes
 * none now. From any thread, callback or signal handler, any number of times: it is never lost or taken back. */
void pyhv_library_look(uc_engine *engine);

/* Lets the next block be of one instruction, and stop->leave() be called before and behind it. */
void pyhv_library_one_instruction(uc_engine *engine);

/* The state of an engine's processor: to be read in callbacks, where all but the arithmetic flags is up to date. */
struct cpu_state *pyhv_library_state(const uc_engine *engine);

/* Both are for callbacks of IN and OUT, and do not return: the instruction faults instead; or the engine returns with RIP
 * on it. Nothing behind it is executed. */
_Noreturn void pyhv_library_fault(uc_engine *engine, uint32_t vector, uint32_t error_code);
_Noreturn void pyhv_library_leave(uc_engine *engine);

/* Whether it was HLT that ended the last run of the engine, whatever else asked for its end at the same time. The library
 * reports both alike. */
int pyhv_library_halted(const uc_engine *engine);

/* Makes an engine in 64-bit mode, which stops between blocks, and a context for it to be saved to and restored from. The
 * context has the size of struct cpu_context, and so holds the identity too. Both are the caller's. */
int pyhv_library_engine(uc_engine **engine, struct cpu_context **context, struct pyhv_error *error);

/* -1 with the library's own words. */
int pyhv_library_fail(struct pyhv_error *error, const char *what, int code);

#endif
