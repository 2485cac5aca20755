/* SPDX-License-Identifier: MIT
 *
 * The emulator's engine with guests of a few bytes: events in real, 32-bit and 64-bit mode, interrupts of the PC's timer,
 * stops. The library is where PYHV_UNICORN says, or found by the dynamic linker; without it the test is skipped.
 */
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include "check.h"
#include "pyhv.h"

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
    struct pyhv_memory memory;
    struct pyhv_emulator_vm *vm;
    struct pyhv_emulator_vcpu *vcpu;
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
    struct pyhv_vm_config config = {.irqchip = (uint32_t)irqchip, .pit = 1};
    machine->bus = pyhv_bus_create(&error);
    struct pyhv_device *port = pyhv_debug_exit_create(0xf4, &error);
    need(port && pyhv_bus_attach(machine->bus, port, &error) == 0, &error);
    need(pyhv_memory_create(&machine->memory, RAM_SIZE, &error) == 0, &error);
    put(machine, ENTRY, code, size);
    machine->memory.host[HANDLER] = HLT;
    machine->vm = pyhv_emulator_vm_create(&config, machine->bus, &error);
    need(machine->vm && pyhv_emulator_vm_map(machine->vm, 0, RAM_SIZE, machine->memory.host, &error) == 0, &error);
    machine->vcpu = pyhv_emulator_vcpu_create(machine->vm, 0, 1000000, &error);
    need(machine->vcpu && pyhv_emulator_vcpu_set_cpuid(machine->vcpu, table, sizeof table / sizeof *table, &error) == 0,
         &error);
}

static void destroy(struct machine *machine)
{
    pyhv_emulator_vcpu_destroy(machine->vcpu);
    pyhv_emulator_vm_destroy(machine->vm);
    pyhv_bus_destroy(machine->bus);
    pyhv_memory_destroy(&machine->memory);
}

static uint32_t run(struct machine *machine, struct pyhv_exit *exit)
{
    pyhv_emulator_vcpu_run(machine->vcpu, exit);
    return exit->stop;
}

static struct pyhv_regs regs_of(struct machine *machine)
{
    struct pyhv_regs regs;
    struct pyhv_error error = {0};
    need(pyhv_emulator_vcpu_get_regs(machine->vcpu, &regs, &error) == 0, &error);
    return regs;
}

static struct pyhv_sregs sregs_of(struct machine *machine)
{
    struct pyhv_sregs sregs;
    struct pyhv_error error = {0};
    need(pyhv_emulator_vcpu_get_sregs(machine->vcpu, &sregs, &error) == 0, &error);
    return sregs;
}

static void start_at(struct machine *machine, struct pyhv_sregs *sregs, uint64_t rip, uint64_t rsp, uint64_t rflags)
{
    struct pyhv_error error = {0};
    struct pyhv_regs regs = {.rip = rip, .rsp = rsp, .rflags = rflags, .rdi = 0x400000};
    need(pyhv_emulator_vcpu_set_sregs(machine->vcpu, sregs, &error) == 0, &error);
    need(pyhv_emulator_vcpu_set_regs(machine->vcpu, &regs, &error) == 0, &error);
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
    CHECK_EQUAL(pyhv_emulator_vcpu_set_msrs(machine.vcpu, indices, values, 3, &error), 3);
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
    CHECK_EQUAL(pyhv_emulator_vcpu_kick(vcpu, NULL), 0);
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
        need(pyhv_emulator_vm_log_dirty(machine.vm, 1, &error) == 0, &error);
        while (i % 100 == 0 && !pages)
            need(pyhv_emulator_vm_take_dirty(machine.vm, &pages, &error) == 0, &error);
        CHECK_EQUAL(pages & ~UINT64_C(1), 0);
        need(pyhv_emulator_vm_log_dirty(machine.vm, 0, &error) == 0, &error);
    }
    unsetenv("PYHV_DIRTY");
    CHECK_EQUAL(pyhv_emulator_vcpu_kick(machine.vcpu, NULL), 0);
    pthread_join(thread, NULL);
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
        need(pyhv_emulator_vcpu_set_regs(machine.vcpu, &regs, &error) == 0, &error);
        CHECK_EQUAL(run(&machine, &exit), PYHV_STOP_GUEST_EXIT);
        pyhv_emulator_vm_get_lapic(machine.vm, page);
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

static void a_timer_that_ran_out_unseen_fires(void)
{
    static const uint8_t code[] = {HLT};
    enum { VECTOR = 0x41, ENABLED = 1, IRR = 0x220, IN_IRR = 1 << (VECTOR % 32), PERIODIC = 1 << 17 };
    uint8_t page[PYHV_LAPIC_SIZE];
    struct machine machine;
    build(&machine, code, sizeof code, 1);
    for (uint32_t initial = 0; initial < 100; initial += 50) {
        pyhv_emulator_vm_get_lapic(machine.vm, page);
        page[0xf1] |= ENABLED;
        put_timer(page, VECTOR, initial, 0);
        pyhv_emulator_vm_set_lapic(machine.vm, page);
        usleep(1);
        pyhv_emulator_vm_get_lapic(machine.vm, page);
        CHECK_EQUAL(page[IRR], initial ? IN_IRR : 0);
    }
    put_timer(page, VECTOR | PERIODIC, UINT32_MAX, 0);
    pyhv_emulator_vm_set_lapic(machine.vm, page);
    pyhv_emulator_vm_get_lapic(machine.vm, page);
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
        pyhv_emulator_vcpu_step(machine.vcpu, &exit);
    pyhv_emulator_vm_get_irqchip(machine.vm, &chip);
    need(pyhv_emulator_vm_set_irqchip(other.vm, &chip, &error) == 0, &error);
    start_real(&other);
    struct pyhv_regs regs = regs_of(&other);
    regs.rip = ENTRY + 5;
    need(pyhv_emulator_vcpu_set_regs(other.vcpu, &regs, &error) == 0, &error);
    pyhv_emulator_vcpu_step(other.vcpu, &exit);
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
    int64_t size = pyhv_emulator_vcpu_get_xsave(machine.vcpu, xsave, sizeof xsave, &error);
    CHECK(size > 512);
    for (int i = 32; i < 416; i++) /* ST0 to XMM15 */
        if (i >= 160 || i % 16 < 10)
            xsave[i] = (uint8_t)(i * 7);
    xsave[0] = 0x7f, xsave[1] = 0x0c, xsave[3] = 0x28, xsave[4] = 0xc3; /* FCW, TOP 5, tags */
    xsave[24] = 0x80, xsave[25] = 0x5f;                                 /* MXCSR */
    CHECK_EQUAL(pyhv_emulator_vcpu_set_xsave(machine.vcpu, xsave, (size_t)size, &error), 0);
    CHECK_EQUAL(pyhv_emulator_vcpu_get_xsave(machine.vcpu, again, sizeof again, &error), size);
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
    CHECK_EQUAL(pyhv_emulator_vcpu_set_sregs(machine.vcpu, &sregs, &error), -1);
    CHECK(strcmp(error.what, "IA32_APIC_BASE") == 0);
    CHECK(!pyhv_emulator_vcpu_create(machine.vm, 1, 1000000, &error));
    CHECK_EQUAL(pyhv_emulator_vcpu_set_mp_state(machine.vcpu, 1, &error), -1);
    struct pyhv_debugregs debug = {.dr7 = 0x401};
    CHECK_EQUAL(pyhv_emulator_vcpu_set_debugregs(machine.vcpu, &debug, &error), -1);
    struct pyhv_events events = {.smm = 1};
    CHECK_EQUAL(pyhv_emulator_vcpu_set_events(machine.vcpu, &events, &error), -1);
    destroy(&machine);
    static const uint8_t fault[] = {0x0f, 0x0b};
    for (int virtual = 0; virtual < 2; virtual ++) {
        struct pyhv_exit exit;
        build(&machine, fault, sizeof fault, 0);
        sregs = protected(&machine, virtual ? 3 : 0, 0);
        put64(&machine, IDT + 6 * 8, (uint64_t)TSS_SELECTOR << 16 | UINT64_C(0x8500) << 32); /* a task gate */
        start_at(&machine, &sregs, ENTRY, STACK, virtual ? 0x20002 : 2);
        CHECK_EQUAL(run(&machine, &exit), PYHV_STOP_FAILED);
        CHECK(strstr(exit.error.detail, virtual ? "cannot do an exception or interrupt in virtual-8086 mode"
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
    the_task_priority_is_one();
    a_timer_that_ran_out_unseen_fires();
    the_speaker_port_is_saved();
    state_written_back_is_unchanged();
    what_cannot_be_is_named();
    return check_report("test_emulator");
}
