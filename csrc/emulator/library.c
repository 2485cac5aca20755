/* SPDX-License-Identifier: MIT
 *
 * Opening the CPU emulator library, and making sure that it is the one that we know.
 */
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "emulator/library.h"
#include "error.h"

struct library uc;

/* Measured on the library by writing each register through its interface and looking what changed. */
#define AT(field, offset) \
    _Static_assert(offsetof(struct cpu_state, field) == (offset), "the library has " #field " at " #offset)
AT(rip, 128);
AT(rflags, 136);
AT(cc_op, 168);
AT(hflags, 176);
AT(segs, 184);
AT(ldt, 328);
AT(tr, 352);
AT(cr, 424);
AT(a20_mask, 496);
AT(efer, 592);
AT(fpstt, 604);
AT(fptags, 612);
AT(fpregs, 624);
AT(mxcsr, 816);
AT(xmm, 824);
AT(sysenter_cs, 4800);
AT(lstar, 4840);
AT(tsc_aux, 4896);
AT(misc_enable, 4920);
AT(pat, 5280);
AT(error_code, 5384);
AT(dr, 5400);
AT(old_exception, 5496);
AT(task_priority, 5556);
_Static_assert(sizeof(struct cpu_state) == 5568, "the library saves so much");
_Static_assert(offsetof(struct cpu_identity, features) == 64, "features follow vendor and version");
_Static_assert(CONTEXT_HEAD == 40, "struct uc_context");

/* Where the check's code runs, and a page of registers for it. */
#define CHECK_PAGE 0x1000u
#define CHECK_MMIO 0x2000u

#define INSTALL "install unicorn==2.1.4 as PyPI has it"

/* The code buffer of an engine. The library's own default, 1 GiB, is too much address space where there are many. */
#define CODE_BUFFER (UINT32_C(16) << 20)

/* Where struct uc_struct has its processor, a size and the switch (include/uc_priv.h), and the processor its marks of HLT
 * and of why it leaves its loop, a pointer that nobody uses, its table of functions (CPUState), and its state: found by
 * their values, and checked below by what they do. */
enum { UC_CPU = 440, UC_CONTEXT_SIZE = 2016, UC_NO_EXIT_REQUEST = 2034 };
enum { UC_JUMPS = 2040, UC_NESTED = UC_JUMPS + 64 * sizeof(sigjmp_buf) }; /* where faults go, a place for each level */
enum { CPU_EXIT_REQUEST = 21, CPU_NEXT_BLOCK = 24, CPU_INTERRUPTS = 28, CPU_COUNTDOWN = 304, CPU_OPAQUE = 33136 };
enum { CPU_HALTED = 33176, CPU_EXCEPTION = 33184, CPU_CLASS = 33200, CPU_STATE = 35408 };
enum { CLASS_INTERRUPT = 144 }; /* what the loop calls where interrupts are requested */
enum { INTERRUPT_HARD = 2 };
enum { NO_EXCEPTION = -1, LEAVE = 0x10001 };

static uint8_t *processor(const uc_engine *engine)
{
    uint8_t *cpu;
    memcpy(&cpu, (const uint8_t *)engine + UC_CPU, sizeof cpu);
    return cpu;
}

/* In the place of the library's own function, which would enter the guest's handler of vector 0. */
static bool between_blocks(uint8_t *cpu, int requested)
{
    (void)requested;
    struct library_stop *stop;
    memcpy(&stop, cpu + CPU_OPAQUE, sizeof stop);
    /* The loop has just cleared what pyhv_library_look() sets. Whoever set it before has written down why before that,
     * and leave() must read it; who sets it later is heard the next time. */
    atomic_thread_fence(memory_order_seq_cst);
    if (stop->leave(stop->opaque)) {
        const int32_t exception = LEAVE;
        memcpy(cpu + CPU_EXCEPTION, &exception, sizeof exception);
        cpu[CPU_EXIT_REQUEST] = 1;
    }
    return false;
}

void pyhv_library_decide(uc_engine *engine, struct library_stop *stop)
{
    uint8_t *cpu = processor(engine), *class;
    bool (*function)(uint8_t *, int) = between_blocks;
    const uint32_t requested = INTERRUPT_HARD; /* always, and nobody takes it back */
    memcpy(&class, cpu + CPU_CLASS, sizeof class);
    memcpy(class + CLASS_INTERRUPT, &function, sizeof function);
    memcpy(cpu + CPU_OPAQUE, &stop, sizeof stop);
    memcpy(cpu + CPU_INTERRUPTS, &requested, sizeof requested);
}

void pyhv_library_look(uc_engine *engine)
{
    uint16_t *countdown; /* each block looks at it first, and goes back to the loop where it is below 0 */
    memcpy(&countdown, processor(engine) + CPU_COUNTDOWN, sizeof countdown);
    __atomic_store_n(countdown + 1, UINT16_MAX, __ATOMIC_SEQ_CST);
}

void pyhv_library_one_instruction(uc_engine *engine)
{
    const uint32_t count = 1;
    memcpy(processor(engine) + CPU_NEXT_BLOCK, &count, sizeof count);
}

struct cpu_state *pyhv_library_state(const uc_engine *engine)
{
    return (struct cpu_state *)(void *)(processor(engine) + CPU_STATE);
}

/* As the library itself ends an instruction. */
_Noreturn static void jump(uc_engine *engine, int32_t exception)
{
    memcpy(processor(engine) + CPU_EXCEPTION, &exception, sizeof exception);
    siglongjmp(*(sigjmp_buf *)(void *)((uint8_t *)engine + UC_JUMPS), 1);
}

_Noreturn void pyhv_library_leave(uc_engine *engine)
{
    jump(engine, LEAVE);
}

_Noreturn void pyhv_library_fault(uc_engine *engine, uint32_t vector, uint32_t error_code)
{
    struct cpu_state *state = pyhv_library_state(engine);
    state->error_code = (int32_t)error_code;
    state->exception_is_int = 0;
    jump(engine, (int32_t)vector);
}

int pyhv_library_halted(const uc_engine *engine)
{
    uint32_t halted;
    memcpy(&halted, processor(engine) + CPU_HALTED, sizeof halted);
    return halted != 0;
}

void pyhv_library_stop_between_blocks(uc_engine *engine, int precise)
{
    ((uint8_t *)engine)[UC_NO_EXIT_REQUEST] = precise != 0;
    uc.ctl(engine, UC_CTL_FLUSH_BLOCKS);
}

int pyhv_library_fail(struct pyhv_error *error, const char *what, int code)
{
    return pyhv_fail(error, 0, what, "%s", uc.strerror(code));
}

/* Tries what the library is about to do, for where it fails the library ends the process: memory for the code that it
 * makes, writable and executable. A process may have been denied that (prctl(2), PR_SET_MDWE). */
static int try_code_buffer(struct pyhv_error *error)
{
    void *buffer = mmap(NULL, CODE_BUFFER, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (buffer == MAP_FAILED)
        return pyhv_fail(error, errno, "mmap", "%u MiB, writable and executable, for translated code",
                         CODE_BUFFER >> 20);
    munmap(buffer, CODE_BUFFER);
    return 0;
}

int pyhv_library_engine(uc_engine **engine, struct cpu_context **context, struct pyhv_error *error)
{
    void *own = NULL;
    *engine = NULL;
    *context = NULL;
    if (try_code_buffer(error) < 0)
        return -1;
    int code = uc.open(UC_ARCH_X86, UC_MODE_64, engine);
    if (code != UC_ERR_OK)
        return pyhv_library_fail(error, "uc_open", code);
    const char *what = "uc_ctl";
    /* The model is only where the features begin: pyhv_emulator_vcpu_set_cpuid() says which there are. */
    if ((code = uc.ctl(*engine, UC_CTL_CPU_MODEL, UC_CPU_X86_QEMU64)) != UC_ERR_OK ||
        (code = uc.ctl(*engine, UC_CTL_CODE_BUFFER, CODE_BUFFER)) != UC_ERR_OK ||
        (code = uc.ctl(*engine, UC_CTL_USE_EXITS, 1)) != UC_ERR_OK) /* no address at which the guest ends */
        goto fail;
    size_t size = uc.context_size(*engine);
    int32_t state_size;
    memcpy(&state_size, (uint8_t *)*engine + UC_CONTEXT_SIZE, sizeof state_size);
    if (size != CONTEXT_HEAD + sizeof(struct cpu_state) || state_size != (int32_t)sizeof(struct cpu_state)) {
        pyhv_fail(error, 0, "libunicorn", "its CPU state has %zu bytes, or %d, expected %zu; %s", size - CONTEXT_HEAD,
                  state_size, sizeof(struct cpu_state), INSTALL);
        goto close;
    }
    what = "uc_context_alloc";
    if ((code = uc.context_alloc(*engine, &own)) != UC_ERR_OK)
        goto fail;
    *context = calloc(1, sizeof **context);
    if (!*context) {
        uc.context_free(own);
        pyhv_fail(error, ENOMEM, what, NULL);
        goto close;
    }
    pyhv_library_stop_between_blocks(*engine, 1);
    memcpy(*context, own, CONTEXT_HEAD);
    uc.context_free(own);
    (*context)->size = sizeof **context - CONTEXT_HEAD;
    return 0;

fail:
    pyhv_library_fail(error, what, code);
close:
    uc.close(*engine);
    *engine = NULL;
    return -1;
}

/* ---------------------------------------------------------------------------------------------- the check -- */

/* What the check's hook saw. */
struct seen {
    uc_engine *engine;
    struct cpu_context *context;
    uint32_t vector;
    uint32_t count;
};

static void see_exception(uc_engine *engine, uint32_t vector, void *opaque)
{
    struct seen *seen = opaque;
    seen->vector = vector;
    seen->count++;
    uc.context_save(engine, seen->context);
    uc.emu_stop(engine);
}

/* Runs code that ends with an exception; false if it did not. */
static bool run_to_exception(struct seen *seen, uint8_t *page, const char *code, size_t size)
{
    memset(page, 0xf4, 64);
    memcpy(page, code, size);
    uc.ctl(seen->engine, UC_CTL_FLUSH_BLOCKS);
    seen->count = 0;
    return uc.emu_start(seen->engine, CHECK_PAGE, 0, 0, 0) == UC_ERR_OK && seen->count == 1;
}

/* What the check of stops has seen. */
struct stops {
    struct library_stop stop;
    uc_engine *engine;
    int writes, looks;
    bool wanted; /* to leave */
    bool on_write;
};

static bool leave_if_wanted(void *opaque)
{
    struct stops *stops = opaque;
    stops->looks++;
    return stops->wanted;
}

static uint64_t zero_on_read(uc_engine *engine, uint64_t offset, unsigned size, void *opaque)
{
    (void)engine, (void)offset, (void)size, (void)opaque;
    return 0;
}

static void stop_on_write(uc_engine *engine, uint64_t offset, unsigned size, uint64_t value, void *opaque)
{
    (void)offset, (void)size, (void)value;
    struct stops *stops = opaque;
    stops->writes++;
    stops->wanted = true;
    pyhv_library_look(engine);
}

static int count_instruction(uc_engine *engine, void *opaque)
{
    (void)engine;
    ++*(int *)opaque;
    return 1;
}

static int32_t nested(const uc_engine *engine)
{
    int32_t level;
    memcpy(&level, (const uint8_t *)engine + UC_NESTED, sizeof level);
    return level;
}

static uint32_t jump_on_in(uc_engine *engine, uint32_t port, int size, void *opaque)
{
    (void)size, (void)opaque;
    if (nested(engine) == 1 && port == 0)
        pyhv_library_fault(engine, 13, 0x28);
    if (nested(engine) == 1)
        pyhv_library_leave(engine);
    return 0;
}

/* Whether a callback of IN can make it fault, and leave: nothing behind it is executed. */
static bool jumps_from_callbacks(struct seen *seen, uint8_t *page)
{
    static const char code[] = {'\xe4', 0, 0x0f, 0x0b}; /* in $0, %al; ud2 */
    const struct cpu_state *state = &seen->context->state;
    uc_engine *engine = seen->engine;
    uint64_t rip = 0;
    uc_hook hook;
    if (uc.hook_add(engine, &hook, UC_HOOK_INSN, (void *)(uintptr_t)jump_on_in, NULL, 1, 0, UC_X86_INS_IN) != UC_ERR_OK)
        return false;
    if (nested(engine) != 0 || !run_to_exception(seen, page, code, sizeof code) || seen->vector != 13 ||
        state->rip != CHECK_PAGE || state->error_code != 0x28 || state->exception_is_int)
        return false;
    page[1] = 1;
    uc.ctl(engine, UC_CTL_FLUSH_BLOCKS);
    return uc.emu_start(engine, CHECK_PAGE, 0, 0, 0) == UC_ERR_OK && seen->count == 1 && !pyhv_library_halted(engine) &&
           uc.reg_read(engine, UC_X86_REG_RIP, &rip) == UC_ERR_OK && rip == CHECK_PAGE;
}

/* Whether the table of functions is where it should be, before anything is written there. */
static bool has_class(uc_engine *engine, const void *handle)
{
    const uint8_t *cpu = processor(engine), *class;
    void *function, *expected = dlsym((void *)(uintptr_t)handle, "x86_cpu_exec_interrupt_x86_64");
    memcpy(&class, cpu + CPU_CLASS, sizeof class);
    memcpy(&function, class + CLASS_INTERRUPT, sizeof function);
    return expected && function == expected;
}

/* Whether a stop that is asked for in the middle of a block happens at its end: nothing is executed twice, and no callback
 * is passed over. Also whether one that was asked for before the start is not forgotten, and whether POPF asks. */
static bool stops_between_blocks(struct stops *stops, uint8_t *page)
{
    /* incl (%rax); rdtsc; inc %ecx; jmp 1f; 1: */
    static const char block[] = {'\xff', 0x00, 0x0f, 0x31, '\xff', '\xc1', '\xeb', 0};
    static const char flags[] = {'\x9c', '\x9d'}; /* pushf; popf; hlt */
    uc_engine *engine = stops->engine;
    uint64_t rax = CHECK_MMIO, rsp = CHECK_PAGE + PYHV_PAGE_SIZE - 8, rip = 0;
    int cpuids = 0, rdtscs = 0;
    uc_hook hook;
    void *count = (void *)(uintptr_t)count_instruction;
    if (uc.hook_add(engine, &hook, UC_HOOK_INSN, count, &cpuids, 1, 0, UC_X86_INS_CPUID) != UC_ERR_OK ||
        uc.hook_add(engine, &hook, UC_HOOK_INSN, count, &rdtscs, 1, 0, UC_X86_INS_RDTSC) != UC_ERR_OK)
        return false;
    memset(page, 0xf4, 64);
    memcpy(page, block, sizeof block);
    uc.ctl(engine, UC_CTL_FLUSH_BLOCKS);
    stops->wanted = true;
    if (uc.emu_start(engine, CHECK_PAGE, 0, 0, 0) != UC_ERR_OK || pyhv_library_halted(engine) || rdtscs != 0)
        return false;
    stops->wanted = false;
    if (uc.mmio_map(engine, CHECK_MMIO, PYHV_PAGE_SIZE, zero_on_read, NULL, stop_on_write, stops) != UC_ERR_OK ||
        uc.reg_write(engine, UC_X86_REG_RAX, &rax) != UC_ERR_OK ||
        uc.emu_start(engine, CHECK_PAGE, 0, 0, 0) != UC_ERR_OK ||
        uc.reg_read(engine, UC_X86_REG_RIP, &rip) != UC_ERR_OK || rip != CHECK_PAGE + sizeof block ||
        stops->writes != 1 || rdtscs != 1 || cpuids != 0 || pyhv_library_halted(engine))
        return false;
    /* The block is now two: INC, and the rest. */
    static const char pair[] = {'\xff', '\xc1', '\xff', '\xc1'}; /* inc %ecx; inc %ecx; hlt */
    memcpy(page, pair, sizeof pair);
    memset(page + sizeof pair, 0xf4, sizeof block);
    uc.ctl(engine, UC_CTL_FLUSH_BLOCKS);
    stops->wanted = false;
    stops->looks = 0;
    pyhv_library_one_instruction(engine);
    if (uc.emu_start(engine, CHECK_PAGE, 0, 0, 0) != UC_ERR_OK || !pyhv_library_halted(engine) || stops->looks != 2)
        return false;
    memcpy(page, flags, sizeof flags);
    memset(page + sizeof flags, 0xf4, sizeof block);
    uc.ctl(engine, UC_CTL_FLUSH_BLOCKS);
    stops->wanted = false;
    stops->looks = 0;
    return uc.reg_write(engine, UC_X86_REG_RSP, &rsp) == UC_ERR_OK &&
           uc.emu_start(engine, CHECK_PAGE, 0, 0, 0) == UC_ERR_OK && pyhv_library_halted(engine) && stops->looks == 2;
}

/* Whether HLT leaves its mark; other ends do not: see above. */
static bool marks_halt(uc_engine *engine, uint8_t *page)
{
    uint64_t rip = 0;
    memset(page, 0xf4, 64);
    uc.ctl(engine, UC_CTL_FLUSH_BLOCKS);
    return uc.emu_start(engine, CHECK_PAGE, 0, 0, 0) == UC_ERR_OK && pyhv_library_halted(engine) == 1 &&
           uc.reg_read(engine, UC_X86_REG_RIP, &rip) == UC_ERR_OK && rip == CHECK_PAGE + 1;
}

/* Writes registers through the interface and finds them in the saved state, and the other way round. Returns the name
 * of the first that is elsewhere, or NULL. */
static const char *misplaced_register(uc_engine *engine, struct cpu_context *context)
{
    const struct cpu_state *state = &context->state;
    if (uc.context_save(engine, context) != UC_ERR_OK)
        return "everything";
    if (memcmp(pyhv_library_state(engine), state, offsetof(struct cpu_state, retaddr)) != 0)
        return "its beginning";
    if (state->efer != 0x500) /* LMA, LME: how the library starts in 64-bit mode */
        return "EFER";
    if (state->old_exception != -1)
        return "old_exception";
    if (state->a20_mask != UINT32_MAX)
        return "a20_mask";
    if (memcmp(context->identity.vendor, "AuthenticAMD", 12) != 0 || context->identity.version != 0x663 ||
        context->identity.features.leaf1_edx != 0x078bfbfd || context->identity.features.leaf1_ecx != 0x80002001 ||
        context->identity.features.extended_edx != 0x2193fbfd || context->identity.features.extended_ecx != 0x5)
        return "CPUID"; /* its model qemu64, less what the library cannot do */

    static const struct {
        const char *name;
        int number;
        size_t offset, size;
        uint64_t marker;
    } registers[] = {
        {"RAX", UC_X86_REG_RAX, offsetof(struct cpu_state, regs[RAX]), 8, 0x1122334455667701},
        {"RCX", UC_X86_REG_RCX, offsetof(struct cpu_state, regs[RCX]), 8, 0x1122334455667702},
        {"RDX", UC_X86_REG_RDX, offsetof(struct cpu_state, regs[RDX]), 8, 0x1122334455667703},
        {"RBX", UC_X86_REG_RBX, offsetof(struct cpu_state, regs[RBX]), 8, 0x1122334455667704},
        {"RSI", UC_X86_REG_RSI, offsetof(struct cpu_state, regs[RSI]), 8, 0x1122334455667705},
        {"R15", UC_X86_REG_R15, offsetof(struct cpu_state, regs[15]), 8, 0x1122334455667706},
        {"RIP", UC_X86_REG_RIP, offsetof(struct cpu_state, rip), 8, 0x1122334455667707},
        {"CR2", UC_X86_REG_CR2, offsetof(struct cpu_state, cr[2]), 8, 0x1122334455667708},
        {"CR8", UC_X86_REG_CR8, offsetof(struct cpu_state, cr[8]), 8, 5},
        {"DR0", UC_X86_REG_DR0, offsetof(struct cpu_state, dr[0]), 8, 0x1122334455667709},
        {"FPCW", UC_X86_REG_FPCW, offsetof(struct cpu_state, fpuc), 2, 0x67f},
        {"MXCSR", UC_X86_REG_MXCSR, offsetof(struct cpu_state, mxcsr), 4, 0x5f80},
        {"ST1", UC_X86_REG_FP1, offsetof(struct cpu_state, fpregs[1].mantissa), 8, 0x112233445566770a},
        {"XMM1", UC_X86_REG_XMM1, offsetof(struct cpu_state, xmm[1].low), 8, 0x112233445566770b},
    };
    for (size_t i = 0; i < sizeof registers / sizeof *registers; i++) {
        uint64_t value[2] = {registers[i].marker, 0};
        if (uc.reg_write(engine, registers[i].number, value) != UC_ERR_OK ||
            uc.context_save(engine, context) != UC_ERR_OK ||
            memcmp((const char *)state + registers[i].offset, value, registers[i].size) != 0)
            return registers[i].name;
    }

    static const struct {
        const char *name;
        uint32_t number;
        size_t offset;
    } msrs[] = {
        {"IA32_LSTAR", 0xc0000082, offsetof(struct cpu_state, lstar)},
        {"KERNEL_GS_BASE", 0xc0000102, offsetof(struct cpu_state, kernel_gs_base)},
        {"IA32_SYSENTER_EIP", 0x176, offsetof(struct cpu_state, sysenter_eip)},
        {"IA32_MISC_ENABLE", 0x1a0, offsetof(struct cpu_state, misc_enable)},
        {"IA32_PAT", 0x277, offsetof(struct cpu_state, pat)},
        {"IA32_TSC_AUX", 0xc0000103, offsetof(struct cpu_state, tsc_aux)},
    };
    for (size_t i = 0; i < sizeof msrs / sizeof *msrs; i++) {
        struct uc_x86_msr msr = {.rid = msrs[i].number, .value = 0x0102030405060708 + i};
        if (uc.reg_write(engine, UC_X86_REG_MSR, &msr) != UC_ERR_OK || uc.context_save(engine, context) != UC_ERR_OK ||
            memcmp((const char *)state + msrs[i].offset, &msr.value, sizeof msr.value) != 0)
            return msrs[i].name;
    }

    const struct uc_x86_mmr table = {.selector = 0x10, .base = 0x1234567890, .limit = 0x777, .flags = 0x8b00};
    if (uc.reg_write(engine, UC_X86_REG_GDTR, &table) != UC_ERR_OK ||
        uc.reg_write(engine, UC_X86_REG_TR, &table) != UC_ERR_OK || uc.context_save(engine, context) != UC_ERR_OK ||
        state->gdt.base != table.base || state->gdt.limit != table.limit)
        return "GDTR";
    if (state->tr.selector != 0x10 || state->tr.base != table.base || state->tr.limit != 0x777 ||
        state->tr.flags != 0x8b00)
        return "TR";

    /* The other way: the flags by their parts. CF, ZF and DF, which are kept apart, and IF. */
    uint64_t flags = 0;
    context->state.cc_op = CC_OP_EFLAGS;
    context->state.cc_src = 0x41;
    context->state.df = -1;
    context->state.rflags = 0x202;
    if (uc.context_restore(engine, context) != UC_ERR_OK ||
        uc.reg_read(engine, UC_X86_REG_RFLAGS, &flags) != UC_ERR_OK || flags != 0x643)
        return "RFLAGS";
    return NULL;
}

/* Runs a few instructions and looks for what they leave behind. */
static const char *misplaced_event(uc_engine *engine, struct cpu_context *context, uint8_t *page, struct stops *stops)
{
    const struct cpu_state *state = &context->state;
    struct seen seen = {.engine = engine, .context = context};
    uc_hook hook;
    if (uc.mem_map_ptr(engine, CHECK_PAGE, PYHV_PAGE_SIZE, UC_PROT_ALL, page) != UC_ERR_OK ||
        uc.hook_add(engine, &hook, UC_HOOK_INTR, (void *)(uintptr_t)see_exception, &seen, 1, 0) != UC_ERR_OK)
        return "the hook";
    static const char interrupt[] = {'\xcd', 0x21}; /* int $0x21 */
    if (!run_to_exception(&seen, page, interrupt, sizeof interrupt) || seen.vector != 0x21)
        return "INT";
    if (!state->exception_is_int || state->exception_next_rip != CHECK_PAGE + 2 || state->rip != CHECK_PAGE + 2)
        return "exception_next_rip";
    /* mov $0x7f8, %eax; mov %eax, %ds: there is no such descriptor */
    static const char fault[] = {'\xb8', '\xf8', 0x07, 0, 0, '\x8e', '\xd8'};
    if (!run_to_exception(&seen, page, fault, sizeof fault) || seen.vector != 13)
        return "#GP";
    if (state->exception_is_int || state->error_code != 0x7f8 || state->rip != CHECK_PAGE + 5)
        return "error_code";
    if (state->old_exception != 13)
        return "old_exception";
    if (!jumps_from_callbacks(&seen, page))
        return "jmp_bufs";
    if (!stops_between_blocks(stops, page))
        return "interrupt_request";
    return marks_halt(engine, page) ? NULL : "halted";
}

static int check_library(const void *handle, struct pyhv_error *error)
{
    uc_engine *engine;
    struct cpu_context *context, *pristine;
    struct stops stops = {.stop = {.leave = leave_if_wanted, .opaque = &stops}};
    if (pyhv_library_engine(&engine, &context, error) < 0)
        return -1;
    stops.engine = engine;
    const char *misplaced = "memory";
    uint8_t *page = aligned_alloc(PYHV_PAGE_SIZE, PYHV_PAGE_SIZE);
    pristine = malloc(sizeof *pristine);
    if (page && pristine) {
        memcpy(pristine, context, sizeof *pristine);
        if (uc.context_save(engine, pristine) == UC_ERR_OK && !(misplaced = misplaced_register(engine, context)) &&
            !(misplaced = has_class(engine, handle) ? NULL : "CPUClass") &&
            uc.context_restore(engine, pristine) == UC_ERR_OK) {
            pyhv_library_decide(engine, &stops.stop);
            misplaced = misplaced_event(engine, context, page, &stops);
        }
    }
    uc.close(engine);
    free(page);
    free(pristine);
    free(context);
    if (!misplaced)
        return 0;
    return pyhv_fail(error, 0, "libunicorn", "its CPU state has %s elsewhere than version 2.1.4; %s", misplaced,
                     INSTALL);
}

static bool load_functions(void *handle, const char **missing)
{
    static const struct {
        const char *name;
        void **place;
    } functions[] = {
        {"uc_version", (void **)&uc.version},
        {"uc_open", (void **)&uc.open},
        {"uc_close", (void **)&uc.close},
        {"uc_strerror", (void **)&uc.strerror},
        {"uc_ctl", (void **)&uc.ctl},
        {"uc_emu_start", (void **)&uc.emu_start},
        {"uc_emu_stop", (void **)&uc.emu_stop},
        {"uc_reg_read", (void **)&uc.reg_read},
        {"uc_reg_write", (void **)&uc.reg_write},
        {"uc_mem_map_ptr", (void **)&uc.mem_map_ptr},
        {"uc_mmio_map", (void **)&uc.mmio_map},
        {"uc_mem_write", (void **)&uc.mem_write},
        {"uc_hook_add", (void **)&uc.hook_add},
        {"uc_context_alloc", (void **)&uc.context_alloc},
        {"uc_context_save", (void **)&uc.context_save},
        {"uc_context_restore", (void **)&uc.context_restore},
        {"uc_context_free", (void **)&uc.context_free},
        {"uc_context_size", (void **)&uc.context_size},
    };
    for (size_t i = 0; i < sizeof functions / sizeof *functions; i++) {
        *functions[i].place = dlsym(handle, functions[i].name);
        if (!*functions[i].place) {
            *missing = functions[i].name;
            return false;
        }
    }
    return true;
}

int pyhv_emulator_open(const char *path, struct pyhv_error *error)
{
    static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    static bool opened;
    int result = 0;
    pthread_mutex_lock(&lock);
    if (!opened) {
        const char *missing = NULL;
        void *handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
        if (!handle) {
            result = pyhv_fail(error, ENOENT, "dlopen", "%s", dlerror());
        } else if (!load_functions(handle, &missing)) {
            result = pyhv_fail(error, 0, "libunicorn", "%s has no function %s", path, missing);
        } else if (uc.version(NULL, NULL) != LIBRARY_VERSION) {
            unsigned version = uc.version(NULL, NULL);
            result = pyhv_fail(error, 0, "libunicorn", "%s is version %u.%u.%u, pyhv knows 2.1.4 only", path,
                               version >> 24, version >> 16 & 0xff, version >> 8 & 0xff);
        } else {
            result = check_library(handle, error);
        }
        opened = result == 0;
        if (!opened && handle)
            dlclose(handle);
    }
    pthread_mutex_unlock(&lock);
    return result;
}
