/* SPDX-License-Identifier: MIT
 *
 * The emulator's engine with guests of a few bytes: events in real, 32-bit and 64-bit mode, interrupts of the PC's timer,
 * stops. The library is where PYHV_UNICORN says, or found by the dynamic linker; without it the test is skipped.
 */
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"
#include "devices/device.h"
#include "emulator/emulator.h"

enum { RAM_SIZE = 0x10000, ENTRY = 0x1000, HANDLER = 0x1100, TIMEOUT_SECONDS = 100 };
enum { GDT = 0x5000, TSS = 0x5100, IDT = 0x6000, STACK = 0x8000, STACK_0 = 0x9000, STACK_IST = 0xa000 };
enum { CODE = 0x08, DATA = 0x10, USER_DATA = 0x1b, USER_CODE = 0x23, TSS_SELECTOR = 0x28 };
enum { HLT = 0xf4 };

/* The library keeps what it has allocated until the process ends. */
const char *__lsan_default_suppressions(void);
const char *__lsan_default_suppressions(void)
{
    return "leak:libunicorn\n";
}

static const struct pyhv_cpuid_entry table[] = {
    {0x0, 0, 0, 0xd, 0x68747541, 0x444d4163, 0x69746e65}, /* AuthenticAMD */
    {0x1, 0, 0, 0x00100f80, 0x00000800, 0x80002001, 0x078bfbff},
    {0x80000000, 0, 0, 0x80000001, 0, 0, 0},
    {0x80000001, 0, 0, 0, 0, 0x1, 0x2fd3fbff},
};

struct machine {
    struct pyhv_bus *bus;
    struct pyhv_device *port; /* the debug-exit port, with interrupt line 4 */
    struct pyhv_memory memory;
    struct pyhv_vm *vm;
    struct pyhv_vcpu *vcpu;
};

static void need(int ok, const struct pyhv_error *error)
{
    if (!ok) {
        fprintf(stderr, "test_emulator: %s: %s\n", error->what, error->detail);
        exit(1);
    }
}

static void put(struct machine *machine, uint64_t gpa, const void *bytes, size_t size)
{
    memcpy(machine->memory.host + gpa, bytes, size);
}

static uint64_t get64(const struct machine *machine, uint64_t gpa)
{
    uint64_t value;
    memcpy(&value, machine->memory.host + gpa, sizeof value);
    return value;
}

static uint32_t get32(const struct machine *machine, uint64_t gpa)
{
    return (uint32_t)get64(machine, gpa);
}

static void put64(struct machine *machine, uint64_t gpa, uint64_t value)
{
    put(machine, gpa, &value, sizeof value);
}

/* A VM with a debug-exit port, and code at ENTRY; HLT at HANDLER. */
static void build(struct machine *machine, const void *code, size_t size, int irqchip)
{
    struct pyhv_error error = {0};
    struct pyhv_vm_config config = {.irqchip = (uint32_t)irqchip, .pit = 1, .tsc_khz = 1000000};
    machine->bus = pyhv_bus_create(&error);
    machine->port = pyhv_debug_exit_create(0xf4, &error);
    need(machine->port && pyhv_bus_attach(machine->bus, machine->port, &error) == 0, &error);
    machine->port->gsi = 4;
    need(pyhv_memory_create(&machine->memory, RAM_SIZE, &error) == 0, &error);
    put(machine, ENTRY, code, size);
    machine->memory.host[HANDLER] = HLT;
    machine->vm = pyhv_emulator_vm_create(&config, machine->bus, &error);
    need(machine->vm && pyhv_vm_map(machine->vm, 0, RAM_SIZE, machine->memory.host, &error) == 0, &error);
    machine->vcpu = pyhv_vcpu_create(machine->vm, 0, &error);
    need(machine->vcpu && pyhv_vcpu_set_cpuid(machine->vcpu, table, sizeof table / sizeof *table, &error) == 0, &error);
}

static void destroy(struct machine *machine)
{
    pyhv_vcpu_destroy(machine->vcpu);
    pyhv_vm_destroy(machine->vm);
    pyhv_bus_destroy(machine->bus);
    pyhv_memory_destroy(&machine->memory);
}

static uint32_t run(struct machine *machine, struct pyhv_exit *exit)
{
    pyhv_vcpu_run(machine->vcpu, exit);
    return exit->stop;
}

static struct pyhv_regs regs_of(struct machine *machine)
{
    struct pyhv_regs regs;
    struct pyhv_error error = {0};
    need(pyhv_vcpu_get_regs(machine->vcpu, &regs, &error) == 0, &error);
    return regs;
}

static struct pyhv_sregs sregs_of(struct machine *machine)
{
    struct pyhv_sregs sregs;
    struct pyhv_error error = {0};
    need(pyhv_vcpu_get_sregs(machine->vcpu, &sregs, &error) == 0, &error);
    return sregs;
}

static void start_at(struct machine *machine, struct pyhv_sregs *sregs, uint64_t rip, uint64_t rsp, uint64_t rflags)
{
    struct pyhv_error error = {0};
    struct pyhv_regs regs = {.rip = rip, .rsp = rsp, .rflags = rflags, .rdi = 0x400000};
    need(pyhv_vcpu_set_sregs(machine->vcpu, sregs, &error) == 0, &error);
    need(pyhv_vcpu_set_regs(machine->vcpu, &regs, &error) == 0, &error);
}

static struct pyhv_segment segment(uint32_t selector, uint32_t attributes)
{
    return (struct pyhv_segment){.selector = selector, .limit = UINT32_MAX, .attributes = attributes};
}

/* --------------------------------------------------------------------------------------------------- real mode -- */

static void start_real(struct machine *machine)
{
    struct pyhv_sregs sregs = sregs_of(machine);
    CHECK_EQUAL(sregs.cs.selector, 0xf000);
    CHECK_EQUAL(sregs.cs.base, 0xffff0000);
    sregs.cs.selector = 0;
    sregs.cs.base = 0;
    start_at(machine, &sregs, ENTRY, STACK, 2);
}

static void software_interrupt_in_real_mode(void)
{
    static const uint8_t code[] = {0xcd, 0x21, HLT};           /* int $0x21 */
    static const uint8_t handler[] = {0xb8, 0x34, 0x12, 0xcf}; /* mov $0x1234, %ax; iret */
    struct machine machine;
    struct pyhv_exit exit;
    build(&machine, code, sizeof code, 0);
    put(&machine, HANDLER, handler, sizeof handler);
    put64(&machine, 0x21 * 4, HANDLER);
    start_real(&machine);
    CHECK_EQUAL(run(&machine, &exit), PYHV_STOP_HALTED);
    struct pyhv_regs regs = regs_of(&machine);
    CHECK_EQUAL(regs.rax, 0x1234);
    CHECK_EQUAL(regs.rsp, STACK);
    CHECK_EQUAL(regs.rip, ENTRY + 3);
    CHECK_EQUAL(get32(&machine, STACK - 6) & 0xffff, ENTRY + 2);
    destroy(&machine);
}

__asm__(".pushsection .rodata\n"
        ".code16\n"
        "timer_code:\n"
        "mov $0x11, %al\n out %al, $0x20\n out %al, $0xa0\n" /* the 8259As: vectors from 0x20, line 0 alone */
        "mov $0x20, %al\n out %al, $0x21\n mov $0x28, %al\n out %al, $0xa1\n"
        "mov $4, %al\n out %al, $0x21\n mov $2, %al\n out %al, $0xa1\n"
        "mov $1, %al\n out %al, $0x21\n out %al, $0xa1\n"
        "mov $0xfe, %al\n out %al, $0x21\n mov $0xff, %al\n out %al, $0xa1\n"
        "mov $0x34, %al\n out %al, $0x43\n" /* the 8254: 11932 ticks are 10 ms */
        "mov $0x9c, %al\n out %al, $0x40\n mov $0x2e, %al\n out %al, $0x40\n"
        "1: sti\n hlt\n cli\n"
        "cmpb $3, 0x500\n jb 1b\n"
        "mov $7, %al\n out %al, $0xf4\n hlt\n"
        "timer_code_end:\n"
        "timer_handler:\n"
        "incb 0x500\n push %ax\n mov $0x20, %al\n out %al, $0x20\n pop %ax\n iret\n"
        "timer_handler_end:\n"
        ".code64\n"
        ".popsection\n");
extern const uint8_t timer_code[], timer_code_end[], timer_handler[], timer_handler_end[];

static void the_timer_interrupts_hlt(void)
{
    struct machine machine;
    struct pyhv_exit exit;
    build(&machine, timer_code, (size_t)(timer_code_end - timer_code), 1);
    put(&machine, HANDLER, timer_handler, (size_t)(timer_handler_end - timer_handler));
    put64(&machine, 0x20 * 4, HANDLER);
    start_real(&machine);
    CHECK_EQUAL(run(&machine, &exit), PYHV_STOP_GUEST_EXIT);
    CHECK_EQUAL(exit.status, 7);
    CHECK_EQUAL(machine.memory.host[0x500], 3);
    destroy(&machine);
}

/* ----------------------------------------------------------------------------------------------- 32-bit mode -- */

static void build_gdt(struct machine *machine, int is_long)
{
    const uint64_t entries[] = {
        0,
        is_long ? 0x00af9b000000ffff : 0x00cf9b000000ffff,
        0x00cf93000000ffff,
        0x00cff3000000ffff,
        is_long ? 0x00affb000000ffff : 0x00cffb000000ffff,
        0x0000890000000067 | (uint64_t)TSS << 16,
        0,
    };
    put(machine, GDT, entries, sizeof entries);
}

static struct pyhv_sregs protected(struct machine *machine, unsigned cpl, int is_long)
{
    struct pyhv_sregs sregs = sregs_of(machine);
    build_gdt(machine, is_long);
    sregs.cs = segment(cpl ? USER_CODE : CODE, (is_long ? 0xa09bu : 0xc09bu) | cpl << 5);
    sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = segment(cpl ? USER_DATA : DATA, 0xc093u | cpl << 5);
    sregs.tr = (struct pyhv_segment){.selector = TSS_SELECTOR, .base = TSS, .limit = 0x67, .attributes = 0x8b};
    sregs.ldt = (struct pyhv_segment){.attributes = 1u << 16};
    sregs.gdt_base = GDT;
    sregs.gdt_limit = 7 * 8 - 1;
    sregs.idt_base = IDT;
    sregs.idt_limit = 0xfff;
    sregs.cr0 = 0x33;
    return sregs;
}

static void a_fault_in_ring_3_of_32_bit_mode(void)
{
    static const uint8_t code[] = {0x0f, 0x0b}; /* ud2 */
    struct machine machine;
    struct pyhv_exit exit;
    build(&machine, code, sizeof code, 0);
    struct pyhv_sregs sregs = protected(&machine, 3, 0);
    put64(&machine, IDT + 6 * 8, (uint64_t)HANDLER | (uint64_t)CODE << 16 | UINT64_C(0x8e00) << 32);
    put64(&machine, TSS + 4, STACK_0 | (uint64_t)DATA << 32);
    start_at(&machine, &sregs, ENTRY, STACK, 2);
    CHECK_EQUAL(run(&machine, &exit), PYHV_STOP_HALTED);
    CHECK_EQUAL(regs_of(&machine).rip, HANDLER + 1);
    CHECK_EQUAL(regs_of(&machine).rsp, STACK_0 - 20);
    CHECK_EQUAL(get32(&machine, STACK_0 - 20), ENTRY);
    CHECK_EQUAL(get32(&machine, STACK_0 - 16), USER_CODE);
    CHECK_EQUAL(get32(&machine, STACK_0 - 12), 0x10002); /* with RF */
    CHECK_EQUAL(get32(&machine, STACK_0 - 8), STACK);
    CHECK_EQUAL(get32(&machine, STACK_0 - 4), USER_DATA);
    CHECK_EQUAL(sregs_of(&machine).ss.selector, DATA);
    destroy(&machine);
}

/* ----------------------------------------------------------------------------------------------- 64-bit mode -- */

static struct pyhv_sregs long_mode(struct machine *machine, unsigned cpl)
{
    struct pyhv_sregs sregs = protected(machine, cpl, 1);
    put64(machine, 0x2000, 0x3007);
    put64(machine, 0x3000, 0x4007);
    put64(machine, 0x4000, 0x87); /* 2 MiB from 0 on, for everybody */
    put64(machine, TSS + 4, STACK_0);
    put64(machine, TSS + 0x24, STACK_IST);
    sregs.cr0 = 0x80000033;
    sregs.cr3 = 0x2000;
    sregs.cr4 = 0x620;
    sregs.efer = 0x501;
    return sregs;
}

static void set_gate(struct machine *machine, unsigned vector, unsigned stack_table, unsigned dpl)
{
    put64(machine, IDT + vector * 16,
          (uint64_t)HANDLER | (uint64_t)CODE << 16 | (uint64_t)stack_table << 32 | (UINT64_C(0x8e) | dpl << 5) << 40);
    put64(machine, IDT + vector * 16 + 8, 0);
}

static void check_frame(struct machine *machine, uint64_t top, int has_error, uint64_t error, uint64_t rip)
{
    uint64_t rsp = regs_of(machine).rsp;
    CHECK_EQUAL(rsp, top - (has_error ? 48 : 40));
    if (has_error)
        CHECK_EQUAL(get64(machine, top - 48), error);
    CHECK_EQUAL(get64(machine, top - 40), rip);
    CHECK_EQUAL(get64(machine, top - 32), USER_CODE);
    CHECK_EQUAL(get64(machine, top - 16), STACK);
    CHECK_EQUAL(get64(machine, top - 8), USER_DATA);
    struct pyhv_sregs sregs = sregs_of(machine);
    CHECK_EQUAL(sregs.cs.selector, CODE);
    CHECK_EQUAL(sregs.ss.selector, 0);
    CHECK_EQUAL(sregs.ss.attributes >> 5 & 3, 0);
}

static void a_page_fault_takes_its_own_stack(void)
{
    static const uint8_t code[] = {0x8b, 0x07}; /* mov (%rdi), %eax, where nothing is mapped */
    struct machine machine;
    struct pyhv_exit exit;
    build(&machine, code, sizeof code, 0);
    struct pyhv_sregs sregs = long_mode(&machine, 3);
    set_gate(&machine, 14, 1, 0);
    start_at(&machine, &sregs, ENTRY, STACK, 2);
    CHECK_EQUAL(run(&machine, &exit), PYHV_STOP_HALTED);
    check_frame(&machine, STACK_IST, 1, 4, ENTRY); /* not present, by the user */
    CHECK_EQUAL(sregs_of(&machine).cr2, 0x400000);
    destroy(&machine);
}

static void software_interrupts_look_at_the_gate(void)
{
    static const uint8_t code[] = {0xcd, 0x30}; /* int $0x30 */
    for (unsigned dpl = 0; dpl <= 3; dpl += 3) {
        struct machine machine;
        struct pyhv_exit exit;
        build(&machine, code, sizeof code, 0);
        struct pyhv_sregs sregs = long_mode(&machine, 3);
        set_gate(&machine, 0x30, 0, dpl);
        set_gate(&machine, 13, 0, 0);
        start_at(&machine, &sregs, ENTRY, STACK, 2);
        CHECK_EQUAL(run(&machine, &exit), PYHV_STOP_HALTED);
        if (dpl == 3)
            check_frame(&machine, STACK_0, 0, 0, ENTRY + 2);
        else
            check_frame(&machine, STACK_0, 1, 0x30 * 8 + 2, ENTRY);
        destroy(&machine);
    }
}

static void faults_become_double_and_triple(void)
{
    static const uint8_t code[] = {0x8b, 0x07};
    for (int handled = 0; handled < 2; handled++) {
        struct machine machine;
        struct pyhv_exit exit;
        build(&machine, code, sizeof code, 0);
        struct pyhv_sregs sregs = long_mode(&machine, 3);
        if (handled)
            set_gate(&machine, 8, 1, 0);
        start_at(&machine, &sregs, ENTRY, STACK, 2);
        CHECK_EQUAL(run(&machine, &exit), handled ? PYHV_STOP_HALTED : PYHV_STOP_TRIPLE_FAULT);
        if (handled)
            check_frame(&machine, STACK_IST, 1, 0, ENTRY);
        else
            CHECK_EQUAL(regs_of(&machine).rip, ENTRY);
        destroy(&machine);
    }
}

/* IN at CPL 3: by IOPL, by the permission bitmap behind the task-state segment, or not at all. */
static void user_mode_asks_for_ports(void)
{
    static const uint8_t code[] = {0xe4, 0x62, 0xa2, 0x00, 0x70, 0, 0, 0, 0, 0, 0, 0xcd, 0x30}; /* in; mov to 0x7000 */
    enum { BITMAP = 0x68, LIMIT = BITMAP + 0x62 / 8 + 1 };
    static const struct {
        uint64_t rflags;
        uint32_t limit, attributes;
        uint8_t bits;
        int allowed;
    } cases[] = {
        {2, 0x67, 0x8b, 0, 0},  {0x3002, 0x67, 0x8b, 0, 1}, {0x2002, LIMIT, 0x8b, 0xff, 0}, {2, LIMIT, 0x8b, 0xfb, 1},
        {2, LIMIT, 0x8b, 4, 0}, {2, LIMIT - 1, 0x8b, 0, 0}, {2, LIMIT, 0x83, 0, 0},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct machine machine;
        struct pyhv_exit exit;
        build(&machine, code, sizeof code, 0);
        struct pyhv_sregs sregs = long_mode(&machine, 3);
        put64(&machine, TSS + 0x60, (uint64_t)BITMAP << 48);
        machine.memory.host[TSS + BITMAP + 0x62 / 8] = cases[i].bits;
        sregs.tr.limit = cases[i].limit;
        sregs.tr.attributes = cases[i].attributes;
        set_gate(&machine, 13, 0, 0);
        set_gate(&machine, 0x30, 0, 3);
        start_at(&machine, &sregs, ENTRY, STACK, cases[i].rflags);
        CHECK_EQUAL(run(&machine, &exit), PYHV_STOP_HALTED);
        if (cases[i].allowed)
            check_frame(&machine, STACK_0, 0, 0, ENTRY + sizeof code);
        else
            check_frame(&machine, STACK_0, 1, 0, ENTRY);
        CHECK_EQUAL(machine.memory.host[0x7000], cases[i].allowed ? 0xff : 0);
        destroy(&machine);
    }
}

static void nothing_happens_behind_an_exit(void)
{
    static const uint8_t codes[][5] = {
        /* out %al, $0xf4; then ud2, syscall, sysenter, incb (%rsp) */
        {0xe6, 0xf4, 0x0f, 0x0b},
        {0xe6, 0xf4, 0x0f, 0x05},
        {0xe6, 0xf4, 0x0f, 0x34},
        {0xe6, 0xf4, 0xfe, 0x04, 0x24},
    };
    for (size_t i = 0; i < sizeof codes / sizeof *codes; i++) {
        struct machine machine;
        struct pyhv_exit exit;
        build(&machine, codes[i], sizeof codes[i], 0);
        struct pyhv_sregs sregs = long_mode(&machine, 0);
        start_at(&machine, &sregs, ENTRY, STACK, 2);
        CHECK_EQUAL(run(&machine, &exit), PYHV_STOP_GUEST_EXIT);
        CHECK_EQUAL(regs_of(&machine).rip, ENTRY + 2);
        CHECK_EQUAL(get64(&machine, STACK), 0);
        destroy(&machine);
    }
}

static void code_outside_of_memory_is_told(void)
{
    static const uint8_t code[] = {0xff, 0xe7}; /* jmp *%rdi */
    struct machine machine;
    struct pyhv_exit exit;
    build(&machine, code, sizeof code, 0);
    struct pyhv_sregs sregs = protected(&machine, 0, 0);
    start_at(&machine, &sregs, ENTRY, STACK, 2);
    CHECK_EQUAL(run(&machine, &exit), PYHV_STOP_INTERNAL_ERROR);
    CHECK_EQUAL(exit.suberror, 1);
    CHECK_EQUAL(exit.rip, 0x400000);
    destroy(&machine);
}

static void system_calls(void)
{
    static const uint8_t code[] = {0x0f, 0x05, 0x90}; /* syscall */
    static const uint32_t indices[] = {0xc0000081, 0xc0000082, 0xc0000084};
    static const uint64_t values[] = {(uint64_t)(USER_CODE - 16) << 48 | (uint64_t)CODE << 32, HANDLER, 0x200};
    struct machine machine;
    struct pyhv_exit exit;
    struct pyhv_error error = {0};
    build(&machine, code, sizeof code, 0);
    struct pyhv_sregs sregs = long_mode(&machine, 3);
    CHECK_EQUAL(pyhv_vcpu_set_msrs(machine.vcpu, indices, values, 3, &error), 3);
    start_at(&machine, &sregs, ENTRY, STACK, 0x202);
    CHECK_EQUAL(run(&machine, &exit), PYHV_STOP_HALTED);
    struct pyhv_regs regs = regs_of(&machine);
    CHECK_EQUAL(regs.rip, HANDLER + 1);
    CHECK_EQUAL(regs.rcx, ENTRY + 2);
    CHECK_EQUAL(regs.r11, 0x202);
    CHECK_EQUAL(regs.rflags, 2);
    CHECK_EQUAL(sregs_of(&machine).cs.selector, CODE);
    CHECK_EQUAL(sregs_of(&machine).ss.selector, DATA);
    destroy(&machine);
}

/* ------------------------------------------------------------------------------------------------------ stops -- */

static void *kick(void *vcpu)
{
    usleep(500);
    CHECK_EQUAL(pyhv_vcpu_kick(vcpu, NULL), 0);
    return NULL;
}

static void kicks(int irqchip, const uint8_t *code, size_t size)
{
    struct machine machine;
    struct pyhv_exit exit;
    build(&machine, code, size, irqchip);
    start_real(&machine);
    for (int i = 0; i < 200; i++) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, kick, machine.vcpu))
            abort();
        CHECK_EQUAL(run(&machine, &exit), PYHV_STOP_KICKED);
        pthread_join(thread, NULL);
    }
    destroy(&machine);
}

static void *run_until_kicked(void *machine)
{
    struct pyhv_exit exit;
    CHECK_EQUAL(run(machine, &exit), PYHV_STOP_KICKED);
    return NULL;
}

/* A limit of the queue of signals that no signal fits in. Where a timer does not fit either, something else is the alarm:
 * the guest's own timer must still end its HLT. */
static void kicks_without_a_queue(void)
{
    static const uint8_t spin[] = {0xeb, 0xfe}, sleep_for_ever[] = {HLT, 0xeb, 0xfd};
    struct rlimit before, none;
    getrlimit(RLIMIT_SIGPENDING, &before);
    none = (struct rlimit){.rlim_cur = 0, .rlim_max = before.rlim_max};
    setrlimit(RLIMIT_SIGPENDING, &none);
    kicks(0, spin, sizeof spin);
    kicks(1, sleep_for_ever, sizeof sleep_for_ever);
    the_timer_interrupts_hlt();
    setrlimit(RLIMIT_SIGPENDING, &before);
}

/* Logging that begins and ends under a guest that writes all the time: its page is told, and no write ends the process. */
static void writes_are_logged_on_and_off(void)
{
    static const uint8_t code[] = {0xff, 0x06, 0x00, 0x03, 0xeb, 0xfa}; /* 1: incw 0x300; jmp 1b */
    struct machine machine;
    struct pyhv_error error = {0};
    pthread_t thread;
    build(&machine, code, sizeof code, 0);
    start_real(&machine);
    if (setenv("PYHV_DIRTY", "fault", 1) || pthread_create(&thread, NULL, run_until_kicked, &machine))
        abort();
    for (int i = 0; i < 20000; i++) {
        uint64_t pages = 0;
        need(pyhv_vm_log_dirty(machine.vm, 1, &error) == 0, &error);
        while (i % 100 == 0 && !pages)
            need(pyhv_vm_take_dirty(machine.vm, &pages, &error) == 0, &error);
        CHECK_EQUAL(pages & ~UINT64_C(1), 0);
        need(pyhv_vm_log_dirty(machine.vm, 0, &error) == 0, &error);
    }
    unsetenv("PYHV_DIRTY");
    CHECK_EQUAL(pyhv_vcpu_kick(machine.vcpu, NULL), 0);
    pthread_join(thread, NULL);
    destroy(&machine);
}

/* A handler that came later and chains, as faulthandler does, is passed over by what is pyhv's, and gets the rest once. */
static struct sigaction below;
static atomic_int others;

static void count_and_chain(int signal, siginfo_t *info, void *context)
{
    atomic_fetch_add(&others, 1);
    below.sa_sigaction(signal, info, context);
}

static void put_on_top(int signal)
{
    struct sigaction action = {.sa_sigaction = count_and_chain, .sa_flags = SA_SIGINFO | SA_NODEFER};
    sigaction(signal, &action, &below);
}

static void a_fault_handler_that_comes_later(void)
{
    static const uint8_t code[] = {0xff, 0x06, 0x00, 0x03, 0xeb, 0xfa}; /* 1: incw 0x300; jmp 1b */
    struct machine machine;
    struct pyhv_exit exit;
    struct pyhv_error error = {0};
    uint64_t pages = 0;
    build(&machine, code, sizeof code, 0);
    start_real(&machine);
    need(pyhv_vcpu_kick(machine.vcpu, &error) == 0, &error);
    CHECK_EQUAL(run(&machine, &exit), PYHV_STOP_KICKED); /* both handlers are there from here on */
    setenv("PYHV_DIRTY", "fault", 1);
    need(pyhv_vm_log_dirty(machine.vm, 1, &error) == 0, &error);
    need(pyhv_vm_log_dirty(machine.vm, 0, &error) == 0, &error);

    put_on_top(SIGSEGV);
    need(pyhv_vm_log_dirty(machine.vm, 1, &error) == 0, &error);
    pyhv_vcpu_step(machine.vcpu, &exit);
    CHECK_EQUAL(exit.stop, PYHV_STOP_DEBUG);
    need(pyhv_vm_take_dirty(machine.vm, &pages, &error) == 0, &error);
    CHECK_EQUAL(pages, 1);
    need(pyhv_vm_log_dirty(machine.vm, 0, &error) == 0, &error);
    unsetenv("PYHV_DIRTY");

    put_on_top(SIGBUS);
    CHECK_EQUAL(ftruncate(machine.memory.fd, 0), 0);
    CHECK_EQUAL(run(&machine, &exit), PYHV_STOP_INTERNAL_ERROR);
    CHECK_EQUAL(exit.suberror, PYHV_SUBERROR_LOST_MEMORY);
    CHECK_EQUAL(others, 0);

    pid_t child = fork(); /* what is not pyhv's: to the other handler, and back, and then it has its usual end */
    if (child == 0) {
        close(STDERR_FILENO); /* AddressSanitizer would tell of it */
        *(volatile uint8_t *)machine.memory.host = 0;
        _exit(2);
    }
    int status = 0;
    CHECK_EQUAL(waitpid(child, &status, 0), child);
#ifdef __SANITIZE_ADDRESS__ /* whose own handler is below pyhv's */
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 1);
#else
    CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGBUS);
#endif
    signal(SIGBUS, SIG_DFL);
    signal(SIGSEGV, SIG_DFL);
    destroy(&machine);
}

/* In a machine with LAPIC: writes CR8 or the LAPIC's task priority and ends the run. */
static void the_task_priority_is_one(void)
{
    static const uint8_t cr8[] = {0x44, 0x0f, 0x22, 0xc1, 0xe6, 0xf4};      /* mov %rcx, %cr8; out %al, $0xf4 */
    static const uint8_t lapic[] = {0xc7, 0x07, 0x30, 0, 0, 0, 0xe6, 0xf4}; /* movl $0x30, (%rdi); out %al, $0xf4 */
    static uint8_t page[PYHV_LAPIC_SIZE];
    struct machine machine;
    struct pyhv_exit exit;
    struct pyhv_error error = {0};
    for (int written = 0; written < 2; written++) {
        build(&machine, written ? lapic : cr8, written ? sizeof lapic : sizeof cr8, 1);
        struct pyhv_sregs sregs = written ? protected(&machine, 0, 0) : long_mode(&machine, 0);
        sregs.cr8 = 2;
        start_at(&machine, &sregs, ENTRY, STACK, 2);
        struct pyhv_regs regs = regs_of(&machine);
        regs.rcx = 5;
        regs.rdi = 0xfee00080;
        need(pyhv_vcpu_set_regs(machine.vcpu, &regs, &error) == 0, &error);
        CHECK_EQUAL(run(&machine, &exit), PYHV_STOP_GUEST_EXIT);
        emulator_get_lapic(machine.vm, page);
        CHECK_EQUAL(page[0x80], written ? 0x30 : 0x50);
        CHECK_EQUAL(sregs_of(&machine).cr8, written ? 3 : 5);
        destroy(&machine);
    }
}

/* Registers of the LAPIC's timer: LVT, initial count, current count. */
static void put_timer(uint8_t *page, uint32_t lvt, uint32_t initial, uint32_t left)
{
    memcpy(page + 0x320, &lvt, sizeof lvt);
    memcpy(page + 0x380, &initial, sizeof initial);
    memcpy(page + 0x390, &left, sizeof left);
}

/* --------------------------------------------------------------------------- two who ask at the same moment -- */

/* Each callback that the engine gives the library is wrapped here, and something else that wants a stop happens
 * immediately before or behind it, on its thread: the timer's signal, a kick, a line of a device. */
enum meanwhile { NOTHING, TIMER, KICK, LINE, MEANWHILES };
static struct {
    enum meanwhile what[2]; /* before, behind */
    struct pyhv_vcpu *vcpu;
    struct pyhv_device *device;
    unsigned calls;
} between;

struct wrapped {
    void *callback, *opaque;
};

static void pulse_line(struct pyhv_device *device)
{
    pthread_mutex_lock(&device->lock);
    pyhv_device_set_irq(device, 1);
    pyhv_device_set_irq(device, 0);
    pthread_mutex_unlock(&device->lock);
}

static void happen(const uc_engine *engine, int behind)
{
    siginfo_t info = {.si_signo = PYHV_KICK_SIGNAL, .si_code = SI_TIMER};
    between.calls++;
    switch (between.what[behind]) {
    case TIMER:
        if (syscall(SYS_rt_tgsigqueueinfo, getpid(), gettid(), info.si_signo, &info) < 0)
            abort();
        break;
    case KICK:
        CHECK_EQUAL(pyhv_vcpu_kick(between.vcpu, NULL), 0);
        break;
    case LINE: /* not in its own handler, which would never end */
        if (pyhv_library_state(engine)->hflags & HF_CPL) {
            pulse_line(between.device);
        }
        break;
    default:
        break;
    }
}

static void wrapped_exception(uc_engine *engine, uint32_t vector, void *opaque)
{
    const struct wrapped *own = opaque;
    happen(engine, 0);
    ((void (*)(uc_engine *, uint32_t, void *))own->callback)(engine, vector, own->opaque);
    happen(engine, 1);
}

static void wrapped_call(uc_engine *engine, void *opaque) /* SYSCALL, SYSENTER */
{
    const struct wrapped *own = opaque;
    happen(engine, 0);
    ((void (*)(uc_engine *, void *))own->callback)(engine, own->opaque);
    happen(engine, 1);
}

static int wrapped_instruction(uc_engine *engine, void *opaque) /* CPUID, RDTSC, RDTSCP */
{
    const struct wrapped *own = opaque;
    happen(engine, 0);
    int done = ((int (*)(uc_engine *, void *))own->callback)(engine, own->opaque);
    happen(engine, 1);
    return done;
}

static uint32_t wrapped_in(uc_engine *engine, uint32_t port, int size, void *opaque)
{
    const struct wrapped *own = opaque;
    happen(engine, 0);
    uint32_t value = ((uint32_t(*)(uc_engine *, uint32_t, int, void *))own->callback)(engine, port, size, own->opaque);
    happen(engine, 1);
    return value;
}

static void wrapped_out(uc_engine *engine, uint32_t port, int size, uint32_t value, void *opaque)
{
    const struct wrapped *own = opaque;
    happen(engine, 0);
    ((void (*)(uc_engine *, uint32_t, int, uint32_t, void *))own->callback)(engine, port, size, value, own->opaque);
    happen(engine, 1);
}

static uint64_t wrapped_mmio_read(uc_engine *engine, uint64_t offset, unsigned size, void *opaque)
{
    const struct wrapped *own = opaque;
    happen(engine, 0);
    uint64_t value =
        ((uint64_t(*)(uc_engine *, uint64_t, unsigned, void *))own->callback)(engine, offset, size, own->opaque);
    happen(engine, 1);
    return value;
}

static void wrapped_mmio_write(uc_engine *engine, uint64_t offset, unsigned size, uint64_t value, void *opaque)
{
    const struct wrapped *own = opaque;
    happen(engine, 0);
    ((void (*)(uc_engine *, uint64_t, unsigned, uint64_t, void *))own->callback)(engine, offset, size, value,
                                                                                 own->opaque);
    happen(engine, 1);
}

static struct library real;

static void *wrap(void *callback, void *opaque)
{
    static struct wrapped all[64];
    static unsigned count;
    struct wrapped *own = &all[count++ % 64]; /* a machine has 8 hooks and 4 functions of memory */
    *own = (struct wrapped){callback, opaque};
    return own;
}

static int wrapping_hook_add(uc_engine *engine, uc_hook *hook, int type, void *callback, void *opaque, uint64_t begin,
                             uint64_t end, ...)
{
    va_list rest;
    va_start(rest, end);
    int instruction = type == UC_HOOK_INSN ? va_arg(rest, int) : 0;
    va_end(rest);
    void *wrapper = type == UC_HOOK_INTR                 ? (void *)(uintptr_t)wrapped_exception
                    : instruction == UC_X86_INS_IN       ? (void *)(uintptr_t)wrapped_in
                    : instruction == UC_X86_INS_OUT      ? (void *)(uintptr_t)wrapped_out
                    : instruction == UC_X86_INS_SYSCALL  ? (void *)(uintptr_t)wrapped_call
                    : instruction == UC_X86_INS_SYSENTER ? (void *)(uintptr_t)wrapped_call
                                                         : (void *)(uintptr_t)wrapped_instruction;
    return real.hook_add(engine, hook, type, wrapper, wrap(callback, opaque), begin, end, instruction);
}

static int wrapping_mmio_map(uc_engine *engine, uint64_t address, uint64_t size,
                             uint64_t (*read)(uc_engine *, uint64_t, unsigned, void *), void *read_opaque,
                             void (*write)(uc_engine *, uint64_t, unsigned, uint64_t, void *), void *write_opaque)
{
    return real.mmio_map(engine, address, size, wrapped_mmio_read, wrap((void *)(uintptr_t)read, read_opaque),
                         wrapped_mmio_write, wrap((void *)(uintptr_t)write, write_opaque));
}

__asm__(
    ".pushsection .rodata\n"
    /* Ring 3: a system call, a fault, a software interrupt, and the ports and instructions that have callbacks. What
         * each must have done is counted; R14: what code behind them has seen. */
    "meeting_user:\n"
    "xor %r14d, %r14d\n"
    "mov $3, %r15d\n"
    "1: mov $0x55, %eax\n syscall\n" /* the kernel adds 1 */
    "cmp $0x56, %eax\n jne 9f\n inc %r14d\n"
    "xor %edx, %edx\n mov (%rdi), %edx\n" /* the kernel skips it, and sets EDX to 7 */
    "cmp $7, %edx\n jne 9f\n inc %r14d\n"
    "int $0x30\n"
    "cmp $9, %edx\n jne 9f\n inc %r14d\n"
    "xor %eax, %eax\n cpuid\n cmp $0x68747541, %ebx\n jne 9f\n inc %r14d\n"
    "rdtsc\n in $0x21, %al\n mov $0xff, %al\n out %al, $0x21\n inc %r14d\n"
    "mov $0xfee00000, %esi\n movl $0x2345, 0x380(%rsi)\n mov 0x380(%rsi), %eax\n"
    "cmp $0x2345, %eax\n jne 9f\n inc %r14d\n"
    "dec %r15d\n jnz 1b\n"
    "mov $3, %al\n out %al, $0xf4\n"
    "9: mov $1, %al\n out %al, $0xf4\n"
    "meeting_user_end:\n"
    /* At HANDLER: SYSCALL; at 32 bytes behind it #PF, at 64 INT 0x30, at 96 an interrupt, at 128 what must not be. */
    "meeting_kernel:\n"
    "incl 0x7000\n inc %eax\n sysretq\n"
    ".skip 32 - (. - meeting_kernel), 0xf4\n"
    "incl 0x7004\n mov $7, %edx\n add $8, %rsp\n addq $2, (%rsp)\n iretq\n"
    ".skip 64 - (. - meeting_kernel), 0xf4\n"
    "incl 0x7008\n mov $9, %edx\n iretq\n"
    ".skip 96 - (. - meeting_kernel), 0xf4\n"
    "incl 0x700c\n push %rax\n mov $0xfee00000, %eax\n movl $0, 0xb0(%rax)\n pop %rax\n iretq\n"
    ".skip 128 - (. - meeting_kernel), 0xf4\n"
    "mov $2, %al\n out %al, $0xf4\n"
    "meeting_kernel_end:\n"
    ".popsection\n");
extern const uint8_t meeting_user[], meeting_user_end[], meeting_kernel[], meeting_kernel_end[];

enum { SYSCALLS = 0x7000, FAULTS = 0x7004, SOFTWARE = 0x7008, INTERRUPTS = 0x700c, IOAPIC = 0xfec00000 };

static void set_gate_at(struct machine *machine, unsigned vector, unsigned dpl, uint64_t handler)
{
    put64(machine, IDT + vector * 16,
          handler | (uint64_t)CODE << 16 | UINT64_C(1) << 32 | (UINT64_C(0x8e) | dpl << 5) << 40);
    put64(machine, IDT + vector * 16 + 8, 0);
}

/* Long mode with the PC's controllers in reach, whose interrupts come as 0x40, at the code's beginning. */
static void start_with_controllers(struct machine *machine, unsigned cpl, uint64_t rflags)
{
    static const uint32_t indices[] = {0xc0000081, 0xc0000082, 0xc0000084};
    static const uint64_t values[] = {(uint64_t)(USER_CODE - 16) << 48 | (uint64_t)CODE << 32, HANDLER, 0x200};
    struct pyhv_error error = {0};
    struct pyhv_irqchip chip;
    uint8_t page[PYHV_LAPIC_SIZE];
    struct pyhv_sregs sregs = long_mode(machine, cpl);
    put64(machine, 0x3000 + 3 * 8, 0xc0000087); /* 1 GiB with the controllers */
    emulator_get_lapic(machine->vm, page);
    page[0xf1] |= 1; /* enabled */
    emulator_set_lapic(machine->vm, page);
    emulator_get_irqchip(machine->vm, &chip);
    chip.ioapic.redirection[4] = 0x40;
    chip.pic[0].imr = 0xff;
    need(emulator_set_irqchip(machine->vm, &chip, &error) == 0, &error);
    need(pyhv_vcpu_set_msrs(machine->vcpu, indices, values, 3, &error) == 3, &error);
    start_at(machine, &sregs, ENTRY, STACK, rflags);
}

static void whoever_asks_for_a_stop_gets_it(void)
{
    real = uc;
    uc.hook_add = wrapping_hook_add;
    uc.mmio_map = wrapping_mmio_map;
    for (int before = 0; before < MEANWHILES; before++)
        for (int behind = 0; behind < MEANWHILES; behind++) {
            struct machine machine;
            struct pyhv_exit exit;
            unsigned kicks = 0;
            between.what[0] = between.what[1] = NOTHING;
            build(&machine, meeting_user, (size_t)(meeting_user_end - meeting_user), 1);
            put(&machine, HANDLER, meeting_kernel, (size_t)(meeting_kernel_end - meeting_kernel));
            set_gate_at(&machine, 14, 0, HANDLER + 32);
            set_gate_at(&machine, 0x30, 3, HANDLER + 64);
            set_gate_at(&machine, 0x40, 0, HANDLER + 96);
            for (unsigned vector = 6; vector < 14; vector++)
                set_gate_at(&machine, vector, 0, HANDLER + 128);
            start_with_controllers(&machine, 3, 0x3202);
            between.vcpu = machine.vcpu;
            between.device = machine.port;
            between.what[0] = (enum meanwhile)before;
            between.what[1] = (enum meanwhile)behind;
            between.calls = 0;
            while (run(&machine, &exit) == PYHV_STOP_KICKED)
                kicks++;
            CHECK_EQUAL(exit.stop, PYHV_STOP_GUEST_EXIT);
            CHECK_EQUAL(exit.status, 3);
            CHECK_EQUAL(regs_of(&machine).r14, 18);
            CHECK_EQUAL(get32(&machine, SYSCALLS), 3);
            CHECK_EQUAL(get32(&machine, FAULTS), 3);
            CHECK_EQUAL(get32(&machine, SOFTWARE), 3);
            CHECK(between.calls >= 3 * 8 * 2);
            CHECK(before == KICK || behind == KICK ? kicks > 0 : kicks == 0);
            CHECK(before == LINE || behind == LINE ? get32(&machine, INTERRUPTS) >= 3 * 5 /* one a block */
                                                   : get32(&machine, INTERRUPTS) == 0);
            between.what[0] = between.what[1] = NOTHING;
            destroy(&machine);
        }
    uc = real;
}

/* The same guest for longer, with a timer of its own, which it seldom lets run out, and a thread that kicks and
 * interrupts: as it comes. */
static void *kick_often(void *opaque)
{
    const struct machine *machine = opaque;
    for (int i = 0; i < 2000; i++) {
        CHECK_EQUAL(pyhv_vcpu_kick(machine->vcpu, NULL), 0);
        usleep((unsigned)(i * 7 % 60));
        pulse_line(machine->port);
    }
    return NULL;
}

static void it_holds_under_stress(void)
{
    enum { ROUNDS = 100000 };
    struct machine machine;
    struct pyhv_exit exit;
    pthread_t thread;
    uint8_t page[PYHV_LAPIC_SIZE];
    static const uint32_t rounds = ROUNDS;
    build(&machine, meeting_user, (size_t)(meeting_user_end - meeting_user), 1);
    put(&machine, ENTRY + 5, &rounds, sizeof rounds); /* mov $ROUNDS, %r15d */
    put(&machine, HANDLER, meeting_kernel, (size_t)(meeting_kernel_end - meeting_kernel));
    set_gate_at(&machine, 14, 0, HANDLER + 32);
    set_gate_at(&machine, 0x30, 3, HANDLER + 64);
    set_gate_at(&machine, 0x40, 0, HANDLER + 96);
    for (unsigned vector = 6; vector < 14; vector++)
        set_gate_at(&machine, vector, 0, HANDLER + 128);
    start_with_controllers(&machine, 3, 0x3202);
    emulator_get_lapic(machine.vm, page);
    put_timer(page, 0x40 | 1 << 17, 0x2345, 0x2345); /* periodic */
    page[0x3e0] = 0xb;
    emulator_set_lapic(machine.vm, page);
    if (pthread_create(&thread, NULL, kick_often, &machine))
        abort();
    while (run(&machine, &exit) == PYHV_STOP_KICKED)
        ;
    pthread_join(thread, NULL);
    CHECK_EQUAL(exit.stop, PYHV_STOP_GUEST_EXIT);
    CHECK_EQUAL(exit.status, 3);
    CHECK_EQUAL(regs_of(&machine).r14, 6 * ROUNDS);
    CHECK_EQUAL(get32(&machine, SYSCALLS), ROUNDS);
    CHECK_EQUAL(get32(&machine, FAULTS), ROUNDS);
    CHECK_EQUAL(get32(&machine, SOFTWARE), ROUNDS);
    CHECK(get32(&machine, INTERRUPTS) > 0);
    destroy(&machine);
}

/* What the handlers of two interrupts and of an NMI write down, in the order in which they come, at the address that is
 * in R8; the place that they have left, too. */
__asm__(
    ".pushsection .rodata\n"
    "order_handlers:\n" /* 32 bytes each: 0x40, 0x50, NMI */
    "movb $0x40, (%r8)\n jmp 1f\n .skip 32 - (. - order_handlers), 0xf4\n"
    "movb $0x50, (%r8)\n jmp 1f\n .skip 64 - (. - order_handlers), 0xf4\n"
    /* The first NMI sends itself another, which must not come before it is over. */
    "movb $2, (%r8)\n mov (%rsp), %r9d\n mov %r9d, 4(%r8)\n add $8, %r8\n"
    "dec %r10d\n jnz 2f\n movl $0x4400, 0x300(%rbx)\n nop\n jmp 3f\n 3: nop\n movb $3, (%r8)\n add $8, %r8\n 2: iretq\n"
    "1: mov (%rsp), %r9d\n mov %r9d, 4(%r8)\n add $8, %r8\n movl $0, 0xb0(%rbx)\n iretq\n"
    "order_handlers_end:\n"
    ".popsection\n");
extern const uint8_t order_handlers[], order_handlers_end[];

/* Sends 0x40 and then 0x50 to itself with interrupts off, and switches them on in some way: both come before the next
 * instruction, the higher one first. Then an NMI to itself, in whose handler another one comes. Then CR8 lets one in. */
__asm__(".pushsection .rodata\n"
        ".macro guest name, body\n"
        "\\name: movl $0x44040, 0x300(%rbx)\n movl $0x44050, 0x300(%rbx)\n \\body\n \\name\\()_next: movb $1, (%r8)\n"
        "mov $7, %al\n out %al, $0xf4\n \\name\\()_end:\n"
        ".endm\n"
        "guest order_sti, \"sti; nop\"\n"
        "guest order_popf, \"pushq $0x202; popf\"\n"
        "guest order_iret, \"mov %rsp, %rax; push $0x10; push %rax; push $0x202; push $8;"
        " lea order_iret_next(%rip), %rax; push %rax; iretq\"\n"
        "guest order_cr8, \"mov $15, %eax; mov %rax, %cr8; sti; nop; nop; xor %eax, %eax; mov %rax, %cr8\"\n"
        "guest order_tpr, \"movl $0xf0, 0x80(%rbx); sti; nop; nop; movl $0, 0x80(%rbx); jmp order_tpr_next\"\n"
        ".popsection\n");
#define GUEST(name) extern const uint8_t name[], name##_next[], name##_end[]
GUEST(order_sti);
GUEST(order_popf);
GUEST(order_iret);
GUEST(order_cr8);
GUEST(order_tpr);

static void build_order(struct machine *machine, const uint8_t *code, size_t size)
{
    build(machine, code, size, 1);
    put(machine, HANDLER, order_handlers, (size_t)(order_handlers_end - order_handlers));
    start_with_controllers(machine, 0, 2);
    set_gate_at(machine, 0x40, 0, HANDLER);
    set_gate_at(machine, 0x50, 0, HANDLER + 32);
    set_gate_at(machine, 2, 0, HANDLER + 64);
}

/* Again and again: translating the code anew takes time, in which what is late may come in time. */
static void run_order(struct machine *machine)
{
    struct pyhv_exit exit;
    struct pyhv_error error = {0};
    struct pyhv_regs regs = {.rip = ENTRY, .rsp = STACK, .rflags = 2, .rbx = 0xfee00000, .r8 = 0x7000, .r10 = 1};
    memset(machine->memory.host + 0x7000, 0, 0x40);
    need(pyhv_vcpu_set_regs(machine->vcpu, &regs, &error) == 0, &error);
    CHECK_EQUAL(run(machine, &exit), PYHV_STOP_GUEST_EXIT);
    CHECK_EQUAL(exit.status, 7);
}

static void interrupts_come_at_once_and_in_order(void)
{
    static const struct {
        const uint8_t *code, *next, *end;
    } guests[] = {
        {order_sti, order_sti_next, order_sti_end},    {order_popf, order_popf_next, order_popf_end},
        {order_iret, order_iret_next, order_iret_end}, {order_cr8, order_cr8_next, order_cr8_end},
        {order_tpr, order_tpr_next, order_tpr_end},
    };
    for (size_t i = 0; i < sizeof guests / sizeof *guests; i++) {
        struct machine machine;
        uint32_t next = (uint32_t)(ENTRY + (guests[i].next - guests[i].code));
        build_order(&machine, guests[i].code, (size_t)(guests[i].end - guests[i].code));
        for (int round = 0; round < 100; round++) {
            run_order(&machine);
            CHECK_EQUAL(machine.memory.host[0x7000], 0x50);
            CHECK_EQUAL(get32(&machine, 0x7004), next);
            CHECK_EQUAL(machine.memory.host[0x7008], 0x40);
            CHECK_EQUAL(get32(&machine, 0x700c), next);
            CHECK_EQUAL(machine.memory.host[0x7010], 1);
        }
        destroy(&machine);
    }
}

static void an_nmi_waits_for_the_end_of_another(void)
{
    /* movl $0x4400, 0x300(%rbx); jmp 1f; 1: movb $1, (%r8); mov $7, %al; out %al, $0xf4 */
    static const uint8_t code[] = {0xc7, 0x83, 0,    3,    0, 0, 0,    0x44, 4,    0,
                                   0xeb, 0,    0x41, 0xc6, 0, 1, 0xb0, 7,    0xe6, 0xf4};
    static const uint8_t order[] = {2, 3, 2, 1};
    struct machine machine;
    build_order(&machine, code, sizeof code);
    for (int round = 0; round < 100; round++) {
        run_order(&machine);
        for (size_t i = 0; i < sizeof order; i++)
            CHECK_EQUAL(machine.memory.host[0x7000 + 8 * i], order[i]);
        CHECK_EQUAL(get32(&machine, 0x7004), ENTRY + 12); /* both where the NMI was sent, and nothing between them */
        CHECK_EQUAL(get32(&machine, 0x7014), ENTRY + 12);
    }
    destroy(&machine);
}

/* An instruction of each feature that works on general registers, as far as the library has it: it needs nothing of x87
 * and SSE, whatever CR0.TS, CR0.EM and CR4.OSFXSR say; and SSE behind it still faults. */
static void general_instructions_need_no_sse(void)
{
    static const struct {
        const char *name;
        uint8_t size, code[10];
    } instructions[] = {
        {"movbe %ax", 6, {0x66, 0x0f, 0x38, 0xf0, 0x04, 0x24}},
        {"movbe %eax", 5, {0x0f, 0x38, 0xf1, 0x04, 0x24}},
        {"crc32b", 5, {0xf2, 0x0f, 0x38, 0xf0, 0xc1}},
        {"crc32w", 6, {0x66, 0xf2, 0x0f, 0x38, 0xf1, 0xc1}},
        {"crc32q", 6, {0xf2, 0x48, 0x0f, 0x38, 0xf1, 0xc1}},
        {"popcnt", 4, {0xf3, 0x0f, 0xb8, 0xc1}},
        {"lzcnt", 4, {0xf3, 0x0f, 0xbd, 0xc1}},
        {"tzcnt", 4, {0xf3, 0x0f, 0xbc, 0xc1}},
        {"andn", 5, {0xc4, 0xe2, 0x70, 0xf2, 0xc2}},
        {"bextr", 5, {0xc4, 0xe2, 0x70, 0xf7, 0xc2}},
        {"blsr", 5, {0xc4, 0xe2, 0x78, 0xf3, 0xc9}},
        {"bzhi", 5, {0xc4, 0xe2, 0x70, 0xf5, 0xc2}},
        {"mulx", 5, {0xc4, 0xe2, 0x73, 0xf6, 0xc2}},
        {"pdep", 5, {0xc4, 0xe2, 0x73, 0xf5, 0xc2}},
        {"pext", 5, {0xc4, 0xe2, 0x72, 0xf5, 0xc2}},
        {"rorx", 6, {0xc4, 0xe3, 0x7b, 0xf0, 0xc1, 3}},
        {"sarx", 5, {0xc4, 0xe2, 0x72, 0xf7, 0xc2}},
        {"shrx", 5, {0xc4, 0xe2, 0x73, 0xf7, 0xc2}},
        {"shlx", 5, {0xc4, 0xe2, 0x71, 0xf7, 0xc2}},
        {"adcx", 5, {0x66, 0x0f, 0x38, 0xf6, 0xc1}},
        {"adox", 5, {0xf3, 0x0f, 0x38, 0xf6, 0xc1}},
        {"cmpxchg16b", 5, {0x48, 0x0f, 0xc7, 0x0c, 0x24}},
        {"rdrand", 3, {0x0f, 0xc7, 0xf0}},
        {"rdtscp", 3, {0x0f, 0x01, 0xf9}},
        {"rdfsbase", 5, {0xf3, 0x48, 0x0f, 0xae, 0xc0}},
        {"clflush", 4, {0x0f, 0xae, 0x3c, 0x24}},
        {"clflushopt", 5, {0x66, 0x0f, 0xae, 0x3c, 0x24}},
        {"clwb", 5, {0x66, 0x0f, 0xae, 0x34, 0x24}},
        {"prefetchw", 4, {0x0f, 0x0d, 0x0c, 0x24}},
        {"lahf", 1, {0x9f}},
    };
    static const struct pyhv_cpuid_entry all[] = {
        {0x0, 0, 0, 0xd, 0x68747541, 0x444d4163, 0x69746e65},
        {0x1, 0, 0, 0x00100f80, 0x00000800, 0xc2f82203, 0x078bfbff},
        {0x7, 0, 0, 0, 0x01880109, 0, 0},
        {0x80000000, 0, 0, 0x80000001, 0, 0, 0},
        {0x80000001, 0, 0, 0, 0, 0x121, 0x2fd3fbff},
    };
    static const uint64_t modes[][2] = {
        {0, 0x620}, {0, 0x420}, {0x8, 0x620}, {0x4, 0x620}, {0xc, 0x420}}; /* CR0, CR4 */
    for (size_t i = 0; i < sizeof instructions / sizeof *instructions; i++)
        for (size_t mode = 0; mode < sizeof modes / sizeof *modes; mode++) {
            struct machine machine;
            struct pyhv_exit exit;
            struct pyhv_error error = {0};
            uint8_t code[32];
            memset(code, HLT, sizeof code);
            memcpy(code, instructions[i].code, instructions[i].size);
            memcpy(code + instructions[i].size, (const uint8_t[]){0x90, 0x0f, 0x28, 0xc1}, 4); /* nop; movaps */
            build(&machine, code, sizeof code, 0);
            need(pyhv_vcpu_set_cpuid(machine.vcpu, all, sizeof all / sizeof *all, &error) == 0, &error);
            struct pyhv_sregs sregs = long_mode(&machine, 0);
            sregs.cr0 = (sregs.cr0 & ~UINT64_C(0xc)) | modes[mode][0];
            sregs.cr4 = modes[mode][1] | 0x10000; /* FSGSBASE */
            set_gate(&machine, 6, 1, 0);
            set_gate(&machine, 7, 1, 0);
            set_gate(&machine, 13, 1, 0);
            if (mode == 0)
                memcpy(machine.memory.host + ENTRY + instructions[i].size, (const uint8_t[]){0x0f, 0x0b}, 2);
            start_at(&machine, &sregs, ENTRY, STACK, 2);
            CHECK_EQUAL(run(&machine, &exit), PYHV_STOP_HALTED);
            /* Behind it NOP and MOVAPS, which faults; but for OSFXSR, which was lent for longer. */
            uint64_t rip = regs_of(&machine).rip, faulted = get64(&machine, STACK_IST - 40) - ENTRY;
            bool executed = rip == HANDLER + 1 ? faulted == instructions[i].size + (mode ? 1u : 0u)
                                               : mode == 1 && rip == ENTRY + instructions[i].size + 5u;
            CHECK(executed);
            if (!executed)
                fprintf(stderr, "%s, mode %zu: fault at %llu\n", instructions[i].name, mode,
                        (unsigned long long)faulted);
            destroy(&machine);
        }
}

/* MOV to a control register of what a processor refuses is #GP at the instruction, and leaves all as it was. */
static void reserved_bits_are_refused(void)
{
    static const struct {
        uint8_t size, code[4];
        unsigned from; /* the control register's number */
        uint64_t clear, set;
        bool refused;
    } cases[] = {
        {3, {0x0f, 0x22, 0xe0}, 4, 0, UINT64_C(1) << 12, true},       /* mov %rax, %cr4: LA57 */
        {3, {0x0f, 0x22, 0xe0}, 4, 0, UINT64_C(1) << 28, true},       /* LAM_SUP */
        {3, {0x0f, 0x22, 0xe0}, 4, 0, UINT64_C(1) << 18, true},       /* OSXSAVE */
        {3, {0x0f, 0x22, 0xe0}, 4, 0, UINT64_C(1) << 17, true},       /* PCIDE */
        {3, {0x0f, 0x22, 0xe0}, 4, 0, UINT64_C(1) << 20, true},       /* SMEP, which is not shown */
        {3, {0x0f, 0x22, 0xe0}, 4, 0, 1, true},                       /* VME */
        {4, {0x41, 0x0f, 0x22, 0xe0}, 4, 0, UINT64_C(1) << 12, true}, /* mov %r8, %cr4 */
        {3, {0x0f, 0x22, 0xe0}, 4, 0, 0x80, false},                   /* PGE */
        {3, {0x0f, 0x22, 0xc0}, 0, 0, 0x20000000, true},              /* mov %rax, %cr0: NW without CD */
        {3, {0x0f, 0x22, 0xc0}, 0, 0, 0x60000000, false},             /* both */
        {3, {0x0f, 0x22, 0xc0}, 0, 1, 0, true},                       /* PG without PE */
        {3, {0x0f, 0x22, 0xd8}, 3, 0, UINT64_C(1) << 63, true},       /* mov %rax, %cr3 */
        {3, {0x0f, 0x22, 0xd8}, 3, 0, 0x18, false},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct machine machine;
        struct pyhv_exit exit;
        struct pyhv_error error = {0};
        uint8_t code[8];
        memset(code, HLT, sizeof code);
        memcpy(code, cases[i].code, cases[i].size);
        build(&machine, code, sizeof code, 0);
        struct pyhv_sregs before = long_mode(&machine, 0);
        set_gate(&machine, 13, 1, 0);
        start_at(&machine, &before, ENTRY, STACK, 2);
        before = sregs_of(&machine);
        uint64_t old = cases[i].from == 0 ? before.cr0 : cases[i].from == 3 ? before.cr3 : before.cr4;
        struct pyhv_regs regs = regs_of(&machine);
        regs.rax = regs.r8 = (old & ~cases[i].clear) | cases[i].set;
        need(pyhv_vcpu_set_regs(machine.vcpu, &regs, &error) == 0, &error);
        CHECK_EQUAL(run(&machine, &exit), PYHV_STOP_HALTED);
        struct pyhv_sregs now = sregs_of(&machine);
        if (cases[i].refused) {
            CHECK_EQUAL(regs_of(&machine).rip, HANDLER + 1);
            CHECK_EQUAL(get64(&machine, STACK_IST - 40), ENTRY);
            CHECK(now.cr0 == before.cr0 && now.cr3 == before.cr3 && now.cr4 == before.cr4 && now.efer == before.efer);
        } else {
            CHECK_EQUAL(regs_of(&machine).rip, ENTRY + cases[i].size + 1u);
            CHECK_EQUAL(cases[i].from == 0 ? now.cr0 : cases[i].from == 3 ? now.cr3 : now.cr4, regs.rax);
        }
        destroy(&machine);
    }
}

/* SMEP and SMAP: what the supervisor may do with the user's pages, and that they are none of the user's business. Below
 * 2 MiB are the supervisor's pages, from there on the same ones as the user's; R8 is a number there. What faults does it
 * at \name\()_fault. */
__asm__(
    ".pushsection .rodata\n"
    ".macro barrier name, body\n \\name:\n \\body\n hlt\n \\name\\()_end:\n .endm\n"
    "barrier smap_read, \"clac; stac; mov (%r8), %eax; clac; smap_read_fault: mov (%r8), %ebx\"\n"
    "barrier smap_popf, \"pushq $0x40002; popf; mov (%r8), %eax; pushq $2; popf; smap_popf_fault: mov %ebx, (%r8)\"\n"
    "barrier smap_iret, \"mov %rsp, %rax; push $0x10; push %rax; push $0x40002; push $8; lea 2f(%rip), %rax; push %rax;"
    " iretq; 2: mov (%r8), %eax; clac; smap_iret_fault: incl (%r8)\"\n"
    "barrier smap_cr4, \"mov (%r8), %eax; mov %rdi, %cr4; smap_cr4_fault: mov (%r8), %ebx\"\n"
    "barrier smap_off, \"mov %cr4, %rax; btr $21, %rax; mov %rax, %cr4; mov (%r8), %eax; mov %rdi, %cr4;"
    " smap_off_fault: mov (%r8), %ebx\"\n"
    "barrier smap_call, \"stac; mov (%r8), %eax; mov $0xc0000084, %ecx; mov $0x40000, %eax; xor %edx, %edx; wrmsr;"
    " mov $0xc0000082, %ecx; lea 2f(%rip), %rax; wrmsr; syscall; 2: smap_call_fault: mov (%r8), %ebx\"\n"
    "barrier smep_jump, \"mov (%r8), %eax; lea smep_jump_fault(%rip), %rax; add $0x200000, %rax; jmp *%rax;"
    " smep_jump_fault: mov %eax, %ebx; hlt\"\n"
    "barrier smep_cr4, \"lea 2f(%rip), %rax; add $0x200000, %rax; push %rax; call *%rax; pop %rax; mov %rdi, %cr4; jmp "
    "*%rax;"
    " 2: smep_cr4_fault: ret\"\n"
    "barrier smap_stack, \"add $0x200000, %rsp; stac; push %rax; pop %rax; clac; smap_stack_fault: push %rax\"\n"
    "barrier user_iret, \"mov %rsp, %rax; push $0x1b; push %rax; push $2; push $0x23; lea 2f(%rip), %rax; push %rax;"
    " iretq; 2: incl (%r8); int $0x30; user_iret_fault: nop\"\n"
    "barrier user_ret, \"push $0x23; lea 2f(%rip), %rax; push %rax; lretq; 2: incl (%r8); int $0x30; user_ret_fault: "
    "nop\"\n"
    "barrier user_call, \"movl $0x23, 0x20f004; lea 2f(%rip), %rax; mov %eax, 0x20f000; lcall *0x20f000;"
    " 2: incl (%r8); add $8, %rsp; int $0x30; user_call_fault: nop\"\n"
    "barrier user_iret_nowhere, \"mov $0x600000, %esp; user_iret_nowhere_fault: iretq\"\n"
    "barrier user_ret_nowhere, \"mov $0x600000, %esp; user_ret_nowhere_fault: lretq\"\n"
    "barrier user_stac, \"user_stac_fault: stac\"\n"
    "barrier stac_hidden, \"stac_hidden_fault: stac\"\n"
    ".popsection\n");
#define BARRIER(name) extern const uint8_t name[], name##_fault[], name##_end[]
BARRIER(smap_read);
BARRIER(smap_popf);
BARRIER(smap_iret);
BARRIER(smap_cr4);
BARRIER(smap_off);
BARRIER(smap_call);
BARRIER(smep_jump);
BARRIER(smep_cr4);
BARRIER(smap_stack);
BARRIER(user_iret);
BARRIER(user_ret);
BARRIER(user_call);
BARRIER(user_iret_nowhere);
BARRIER(user_ret_nowhere);
BARRIER(user_stac);
BARRIER(stac_hidden);

static const struct pyhv_cpuid_entry table_with_barriers[] = {
    {0x0, 0, 0, 0xd, 0x68747541, 0x444d4163, 0x69746e65},
    {0x1, 0, 0, 0x00100f80, 0x00000800, 0x80002001, 0x078bfbff},
    {0x7, 0, 0, 0, 0x00100080, 0, 0}, /* SMEP, SMAP */
    {0x80000000, 0, 0, 0x80000001, 0, 0, 0},
    {0x80000001, 0, 0, 0, 0, 0x1, 0x2fd3fbff},
};
enum { USERS = 0x200000, UNTOUCHED = 0x1234, SMEP = 1 << 20, SMAP = 1 << 21 };

static struct pyhv_sregs with_barriers(struct machine *machine, unsigned cpl, uint64_t cr4)
{
    static const uint32_t indices[] = {0xc0000081, 0xc0000082, 0xc0000084};
    static const uint64_t values[] = {(uint64_t)(USER_CODE - 16) << 48 | (uint64_t)CODE << 32, HANDLER, 0x200};
    struct pyhv_error error = {0};
    struct pyhv_sregs sregs = long_mode(machine, cpl);
    put64(machine, 0x4000, 0x83);
    put64(machine, 0x4008, 0x87);
    sregs.cr2 = UNTOUCHED;
    sregs.cr4 |= cr4;
    need(pyhv_vcpu_set_cpuid(machine->vcpu, table_with_barriers,
                             sizeof table_with_barriers / sizeof *table_with_barriers, &error) == 0,
         &error);
    need(pyhv_vcpu_set_msrs(machine->vcpu, indices, values, 3, &error) == 3, &error);
    for (unsigned vector = 0; vector < 32; vector++)
        set_gate(machine, vector, 1, 0);
    set_gate(machine, 0x30, 1, 3);
    return sregs;
}

static void the_supervisor_stays_off_the_users_pages(void)
{
    enum { NOTHING_SHOWN = 1 };
#define CASE(name, ...)                                    \
    {                                                      \
#name, name, name##_fault, name##_end, __VA_ARGS__ \
    }
    static const struct {
        const char *name;
        const uint8_t *code, *fault, *end;
        unsigned cpl;
        uint64_t cr4, later; /* at the beginning, and in RDI */
        unsigned vector, error_code, count;
    } cases[] = {
        CASE(smap_read, 0, SMAP, 0, 14, 1, 0),          CASE(smap_popf, 0, SMAP, 0, 14, 3, 0),
        CASE(smap_iret, 0, SMAP, 0, 14, 1, 0),          CASE(smap_cr4, 0, 0, SMAP, 14, 1, 0),
        CASE(smap_off, 0, SMAP, SMAP, 14, 1, 0),        CASE(smap_call, 0, SMAP, 0, 14, 1, 0),
        CASE(smap_stack, 0, SMAP, 0, 14, 3, 0),         CASE(smep_jump, 0, SMEP, 0, 14, 0x11, 0),
        CASE(smep_cr4, 0, 0, SMEP, 14, 0x11, 0),        CASE(user_iret, 3, SMEP | SMAP, 0, 0x30, 0, 1),
        CASE(user_iret, 3, 0, 0, 0x30, 0, 1),           CASE(user_ret, 3, SMEP | SMAP, 0, 0x30, 0, 1),
        CASE(user_call, 3, SMEP | SMAP, 0, 0x30, 0, 1), CASE(user_iret_nowhere, 3, SMAP, 0, 14, 4, 0),
        CASE(user_iret_nowhere, 3, 0, 0, 14, 4, 0),     CASE(user_ret_nowhere, 3, SMAP, 0, 14, 4, 0),
        CASE(user_stac, 3, SMAP, 0, 6, 0, 0),           CASE(stac_hidden, 0, 0, NOTHING_SHOWN, 6, 0, 0),
    };
#undef CASE
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct machine machine;
        struct pyhv_exit exit;
        struct pyhv_error error = {0};
        unsigned failures = check_failures;
        uint64_t users = cases[i].cpl || strncmp(cases[i].name, "smep", 4) == 0 ? USERS : 0;
        build(&machine, cases[i].code, (size_t)(cases[i].end - cases[i].code), 0);
        struct pyhv_sregs sregs = with_barriers(&machine, cases[i].cpl, cases[i].cr4);
        if (cases[i].later == NOTHING_SHOWN)
            need(pyhv_vcpu_set_cpuid(machine.vcpu, table, sizeof table / sizeof *table, &error) == 0, &error);
        start_at(&machine, &sregs, ENTRY + (cases[i].cpl ? USERS : 0), STACK + (cases[i].cpl ? USERS : 0), 2);
        struct pyhv_regs regs = regs_of(&machine);
        regs.r8 = USERS + 0x7000;
        regs.rdi = sregs.cr4 | cases[i].later;
        need(pyhv_vcpu_set_regs(machine.vcpu, &regs, &error) == 0, &error);
        CHECK_EQUAL(run(&machine, &exit), PYHV_STOP_HALTED);
        CHECK_EQUAL(regs_of(&machine).rip, HANDLER + 1);
        CHECK_EQUAL(regs_of(&machine).rsp, STACK_IST - (cases[i].vector == 14 ? 48 : 40));
        if (cases[i].vector == 14)
            CHECK_EQUAL(get64(&machine, STACK_IST - 48), cases[i].error_code);
        CHECK_EQUAL(get64(&machine, STACK_IST - 40), users + ENTRY + (uint64_t)(cases[i].fault - cases[i].code));
        CHECK_EQUAL(get32(&machine, 0x7000), cases[i].count);
        CHECK(cases[i].vector == 14 ? sregs_of(&machine).cr2 != UNTOUCHED : sregs_of(&machine).cr2 == UNTOUCHED);
        if (check_failures != failures)
            fprintf(stderr, "%s, CR4 0x%llx\n", cases[i].name, (unsigned long long)cases[i].cr4);
        destroy(&machine);
    }
}

/* The processor's own accesses: a table in a user's page is none with SMAP, whatever EFLAGS.AC says; a stack there is one
 * with AC. */
static void smap_holds_for_tables(void)
{
    enum { IN_IDT, IN_GDT, IN_TSS, ON_STACK, PLACES, AC = 1 << 18 };
    static const uint8_t code[] = {0x0f, 0x0b}; /* ud2 */
    for (int place = 0; place < PLACES; place++)
        for (unsigned how = 0; how < 4; how++) {
            struct machine machine;
            struct pyhv_exit exit;
            const bool smap = how & 1, ac = how & 2;
            build(&machine, code, sizeof code, 0);
            struct pyhv_sregs sregs = with_barriers(&machine, 0, smap ? SMAP : 0);
            sregs.idt_base += place == IN_IDT ? USERS : 0;
            sregs.gdt_base += place == IN_GDT ? USERS : 0;
            sregs.tr.base += place == IN_TSS ? USERS : 0;
            if (place == ON_STACK) {
                set_gate(&machine, 6, 0, 0);
                set_gate(&machine, 14, 0, 0); /* and #DF has a stack of its own */
            }
            start_at(&machine, &sregs, ENTRY, STACK + (place == ON_STACK ? USERS : 0), ac ? AC | 2 : 2);
            CHECK_EQUAL(run(&machine, &exit), smap && place != ON_STACK ? PYHV_STOP_TRIPLE_FAULT : PYHV_STOP_HALTED);
            if (place == ON_STACK)
                CHECK_EQUAL(regs_of(&machine).rsp, smap && !ac ? STACK_IST - 48 : USERS + STACK - 40);
            destroy(&machine);
        }
}

/* SYSCALL with TF: FMASK takes it away, and no #DB comes; where it does not, #DB comes at the kernel's first instruction. */
static void single_steps_over_a_system_call(void)
{
    static const uint8_t code[] = {0x0f, 0x05, 0x90};
    for (int kept = 0; kept < 2; kept++) {
        struct machine machine;
        struct pyhv_exit exit;
        struct pyhv_error error = {0};
        uint32_t index = 0xc0000084;
        uint64_t mask = kept ? 0x200 : 0x300;
        build(&machine, code, sizeof code, 1);
        start_with_controllers(&machine, 3, 0x302);
        need(pyhv_vcpu_set_msrs(machine.vcpu, &index, &mask, 1, &error) == 1, &error);
        static const uint8_t leave[] = {0xe6, 0xf4};
        put(&machine, HANDLER, leave, sizeof leave);
        put(&machine, HANDLER + 32, leave, sizeof leave);
        set_gate_at(&machine, 1, 0, HANDLER + 32);
        CHECK_EQUAL(run(&machine, &exit), PYHV_STOP_GUEST_EXIT);
        CHECK_EQUAL(regs_of(&machine).rip, HANDLER + (kept ? 32 : 0) + 2);
        CHECK_EQUAL(regs_of(&machine).rcx, ENTRY + 2);
        if (kept)
            CHECK_EQUAL(get64(&machine, STACK_IST - 40), HANDLER);
        destroy(&machine);
    }
}

static void a_timer_that_ran_out_unseen_fires(void)
{
    static const uint8_t code[] = {HLT};
    enum { VECTOR = 0x41, ENABLED = 1, IRR = 0x220, IN_IRR = 1 << (VECTOR % 32), PERIODIC = 1 << 17 };
    uint8_t page[PYHV_LAPIC_SIZE];
    struct machine machine;
    build(&machine, code, sizeof code, 1);
    for (uint32_t initial = 0; initial < 100; initial += 50) {
        emulator_get_lapic(machine.vm, page);
        page[0xf1] |= ENABLED;
        put_timer(page, VECTOR, initial, 0);
        emulator_set_lapic(machine.vm, page);
        usleep(1);
        emulator_get_lapic(machine.vm, page);
        CHECK_EQUAL(page[IRR], initial ? IN_IRR : 0);
    }
    put_timer(page, VECTOR | PERIODIC, UINT32_MAX, 0);
    emulator_set_lapic(machine.vm, page);
    emulator_get_lapic(machine.vm, page);
    CHECK(page[0x393] != 0);
    destroy(&machine);
}

static void the_speaker_port_is_saved(void)
{
    static const uint8_t code[] = {0xb0, 3, 0xe6, 0x61, HLT, 0xe4, 0x61, HLT}; /* out 3 to 0x61; hlt; in from it */
    struct machine machine, other;
    struct pyhv_irqchip chip;
    struct pyhv_exit exit;
    struct pyhv_error error = {0};
    build(&machine, code, sizeof code, 1);
    build(&other, code, sizeof code, 1);
    start_real(&machine);
    for (int i = 0; i < 4; i++)
        pyhv_vcpu_step(machine.vcpu, &exit);
    emulator_get_irqchip(machine.vm, &chip);
    need(emulator_set_irqchip(other.vm, &chip, &error) == 0, &error);
    start_real(&other);
    struct pyhv_regs regs = regs_of(&other);
    regs.rip = ENTRY + 5;
    need(pyhv_vcpu_set_regs(other.vcpu, &regs, &error) == 0, &error);
    pyhv_vcpu_step(other.vcpu, &exit);
    CHECK_EQUAL(regs_of(&other).rax & 3, 3);
    destroy(&machine);
    destroy(&other);
}

static void state_written_back_is_unchanged(void)
{
    static const uint8_t code[] = {HLT};
    static uint8_t xsave[PYHV_XSAVE_MAX], again[PYHV_XSAVE_MAX];
    struct machine machine;
    struct pyhv_error error = {0};
    build(&machine, code, sizeof code, 0);
    struct pyhv_sregs sregs = long_mode(&machine, 3);
    start_at(&machine, &sregs, ENTRY, STACK, 0x8d7 | 0x400);
    CHECK_EQUAL(regs_of(&machine).rflags, 0x8d7 | 0x400);
    struct pyhv_sregs now = sregs_of(&machine);
    CHECK(memcmp(&now, &sregs, sizeof now) == 0);
    int64_t size = emulator_get_xsave(machine.vcpu, xsave, sizeof xsave, &error);
    CHECK(size > 512);
    for (int i = 32; i < 416; i++) /* ST0 to XMM15 */
        if (i >= 160 || i % 16 < 10)
            xsave[i] = (uint8_t)(i * 7);
    xsave[0] = 0x7f, xsave[1] = 0x0c, xsave[3] = 0x28, xsave[4] = 0xc3; /* FCW, TOP 5, tags */
    xsave[24] = 0x80, xsave[25] = 0x5f;                                 /* MXCSR */
    CHECK_EQUAL(emulator_set_xsave(machine.vcpu, xsave, (size_t)size, &error), 0);
    CHECK_EQUAL(emulator_get_xsave(machine.vcpu, again, sizeof again, &error), size);
    CHECK(memcmp(xsave, again, (size_t)size) == 0);
    destroy(&machine);
}

static void what_cannot_be_is_named(void)
{
    static const uint8_t code[] = {HLT};
    struct machine machine;
    struct pyhv_error error = {0};
    build(&machine, code, sizeof code, 0);
    struct pyhv_sregs sregs = sregs_of(&machine);
    sregs.apic_base += 0x1000;
    CHECK_EQUAL(pyhv_vcpu_set_sregs(machine.vcpu, &sregs, &error), -1);
    CHECK(strcmp(error.what, "IA32_APIC_BASE") == 0);
    CHECK(!pyhv_vcpu_create(machine.vm, 1, &error));
    CHECK_EQUAL(emulator_set_mp_state(machine.vcpu, 1, &error), -1);
    struct pyhv_debugregs debug = {.dr7 = 0x401};
    CHECK_EQUAL(emulator_set_debugregs(machine.vcpu, &debug, &error), -1);
    struct pyhv_events events = {.smm = 1};
    CHECK_EQUAL(emulator_set_events(machine.vcpu, &events, &error), -1);
    destroy(&machine);
    static const uint8_t fault[] = {0x0f, 0x0b};
    for (int in_v86 = 0; in_v86 < 2; in_v86++) {
        struct pyhv_exit exit;
        build(&machine, fault, sizeof fault, 0);
        sregs = protected(&machine, in_v86 ? 3 : 0, 0);
        put64(&machine, IDT + 6 * 8, (uint64_t)TSS_SELECTOR << 16 | UINT64_C(0x8500) << 32); /* a task gate */
        start_at(&machine, &sregs, ENTRY, STACK, in_v86 ? 0x20002 : 2);
        CHECK_EQUAL(run(&machine, &exit), PYHV_STOP_INTERNAL_ERROR);
        CHECK_EQUAL(exit.suberror, PYHV_SUBERROR_NO_EVENT);
        CHECK(strstr(exit.error.detail, in_v86 ? "cannot do an exception or interrupt in virtual-8086 mode"
                                               : "cannot do a task gate in the IDT"));
        destroy(&machine);
    }
    CHECK_EQUAL(pyhv_emulator_open("/no/such/library", &error), 0); /* it is open already */
}

int main(void)
{
    struct pyhv_error error = {0};
    const char *path = getenv("PYHV_UNICORN");
    static const uint8_t spin[] = {0xeb, 0xfe}, sleep_for_ever[] = {HLT, 0xeb, 0xfd};
    if (pyhv_emulator_open(path && *path ? path : "libunicorn.so.2", &error) < 0) {
        if (error.errnum != ENOENT)
            need(0, &error);
        printf("test_emulator: skipped: %s: %s\n", error.what, error.detail);
        return 0;
    }
    alarm(TIMEOUT_SECONDS); /* a lost kick must not hang the tests */
    software_interrupt_in_real_mode();
    the_timer_interrupts_hlt();
    a_fault_in_ring_3_of_32_bit_mode();
    a_page_fault_takes_its_own_stack();
    software_interrupts_look_at_the_gate();
    faults_become_double_and_triple();
    user_mode_asks_for_ports();
    nothing_happens_behind_an_exit();
    code_outside_of_memory_is_told();
    system_calls();
    kicks(0, spin, sizeof spin);
    kicks(1, sleep_for_ever, sizeof sleep_for_ever);
    kicks_without_a_queue();
    writes_are_logged_on_and_off();
    a_fault_handler_that_comes_later();
    the_task_priority_is_one();
    whoever_asks_for_a_stop_gets_it();
    it_holds_under_stress();
    interrupts_come_at_once_and_in_order();
    an_nmi_waits_for_the_end_of_another();
    general_instructions_need_no_sse();
    reserved_bits_are_refused();
    the_supervisor_stays_off_the_users_pages();
    smap_holds_for_tables();
    single_steps_over_a_system_call();
    a_timer_that_ran_out_unseen_fires();
    the_speaker_port_is_saved();
    state_written_back_is_unchanged();
    what_cannot_be_is_named();
    return check_report("test_emulator");
}
