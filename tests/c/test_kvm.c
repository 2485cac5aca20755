/* SPDX-License-Identifier: MIT
 *
 * The engine on a real /dev/kvm, with guests of a few bytes in real mode. Needs nothing but the engine and the device,
 * so it also runs under sanitizers and inside the lab's hosts.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "check.h"
#include "kvm/kvm.h"

enum { RAM_SIZE = 0x10000, ENTRY = 0x1000, TIMEOUT_SECONDS = 60 };

static int kvm_fd;

/* The host that the engine believes to be on: it may say that it scales TSC rates, and refuses then to do it, else it takes
 * a rate as KVM takes a higher one; and it has a PMU that can be switched off. */
static struct {
    int on, scales;
    int rates;    /* how often it was asked for one */
    uint64_t ssp; /* it has one register, of this number: */
    uint64_t ssp_id;
    int vcpus, pmu_off; /* of vcpus, so many were made after the PMU was switched off */
} other_host;

/* In place of the C library's. */
int ioctl(int fd, unsigned long request, ...)
{
    va_list arguments;
    va_start(arguments, request);
    unsigned long argument = va_arg(arguments, unsigned long);
    va_end(arguments);
    if (other_host.on && request == KVM_SET_TSC_KHZ) {
        other_host.rates++;
        if (!other_host.scales)
            return 0;
        errno = EINVAL;
        return -1;
    }
    if (other_host.on && request == KVM_CHECK_EXTENSION && argument == KVM_CAP_TSC_CONTROL)
        return other_host.scales;
    if (other_host.on && request == KVM_CHECK_EXTENSION && argument == KVM_CAP_PMU_CAPABILITY)
        return KVM_PMU_CAP_DISABLE;
    const struct kvm_one_reg *reg = (const void *)argument;
    if (other_host.on && (request == KVM_GET_ONE_REG || request == KVM_SET_ONE_REG)) {
        if (reg->id != other_host.ssp_id) {
            errno = EINVAL;
            return -1;
        }
        uint64_t *value = (uint64_t *)(uintptr_t)reg->addr;
        *(request == KVM_GET_ONE_REG ? value : &other_host.ssp) = request == KVM_GET_ONE_REG ? other_host.ssp : *value;
        return 0;
    }
    const struct kvm_enable_cap *cap = (const void *)argument;
    if (other_host.on && request == KVM_ENABLE_CAP && cap->cap == KVM_CAP_PMU_CAPABILITY) {
        other_host.pmu_off = other_host.vcpus == 0 && cap->args[0] == KVM_PMU_CAP_DISABLE;
        return 0;
    }
    if (other_host.on && request == KVM_CREATE_VCPU)
        other_host.vcpus++;
    return (int)syscall(SYS_ioctl, fd, request, argument);
}

/* A VM with the devices, one vCPU in real mode at ENTRY, and a guest's bytes there. */
struct machine {
    struct pyhv_bus *bus;
    struct pyhv_memory memory;
    struct pyhv_vm *vm;
    struct pyhv_vcpu *vcpu;
    int console[2];
};

static const struct pyhv_cpuid_entry table_entries[] = {
    {0x0, 0, 0, 0xd, 0x68747541, 0x444d4163, 0x69746e65}, /* AuthenticAMD */
    {0x1, 0, 0, 0x00100f80, 0x00000800, 0x80002001, 0x078bfbff},
    {0x7, 0, 1, 0, 0x11111111, 0x22222222, 0x33333333},
};
enum { TABLE_COUNT = sizeof table_entries / sizeof table_entries[0] };

static void fatal(const char *what, const struct pyhv_error *error)
{
    fprintf(stderr, "test_kvm: %s: %s: %s %s\n", what, error->what, strerror(error->errnum), error->detail);
    exit(1);
}

static void attach(struct machine *machine, struct pyhv_device *device, struct pyhv_error *error)
{
    if (!device || pyhv_bus_attach(machine->bus, device, error) < 0)
        fatal("device", error);
}

static void build(struct machine *machine, const void *code, size_t size, int irqchip)
{
    struct pyhv_error error = {0};
    struct pyhv_vm_config config = {.irqchip = (uint32_t)irqchip, .pit = 1};
    if (pipe(machine->console) < 0)
        abort();
    machine->bus = pyhv_bus_create(&error);
    attach(machine, pyhv_uart16550_create(0x3f8, 4, -1, machine->console[1], &error), &error);
    attach(machine, pyhv_debug_exit_create(0xf4, &error), &error);
    attach(machine, pyhv_i8042_create(&error), &error);
    attach(machine, pyhv_cmos_create(RAM_SIZE, 0, &error), &error);
    if (pyhv_memory_create(&machine->memory, RAM_SIZE, &error) < 0)
        fatal("memory", &error);
    memcpy(machine->memory.host + ENTRY, code, size);
    machine->vm = pyhv_kvm_vm_create(kvm_fd, &config, machine->bus, &error);
    if (!machine->vm || pyhv_vm_map(machine->vm, 0, RAM_SIZE, machine->memory.host, &error) < 0)
        fatal("VM", &error);
    machine->vcpu = pyhv_vcpu_create(machine->vm, 0, &error);
    if (!machine->vcpu || pyhv_vcpu_set_cpuid(machine->vcpu, table_entries, TABLE_COUNT, &error) < 0)
        fatal("vCPU", &error);

    struct pyhv_sregs sregs;
    struct pyhv_regs regs = {.rip = ENTRY, .rsp = 0xff00, .rflags = 2};
    if (pyhv_vcpu_get_sregs(machine->vcpu, &sregs, &error) < 0)
        fatal("registers", &error);
    sregs.cs.base = sregs.cs.selector = 0;
    if (pyhv_vcpu_set_sregs(machine->vcpu, &sregs, &error) < 0 || pyhv_vcpu_set_regs(machine->vcpu, &regs, &error) < 0)
        fatal("registers", &error);
}

static void destroy(struct machine *machine)
{
    pyhv_vcpu_destroy(machine->vcpu);
    pyhv_vm_destroy(machine->vm);
    pyhv_bus_destroy(machine->bus);
    pyhv_memory_destroy(&machine->memory);
    close(machine->console[0]);
    close(machine->console[1]);
}

/* ------------------------------------------------------------------------------------- how each run ends -- */

static const struct ending {
    const char *name;
    uint8_t code[40];
    enum pyhv_stop stop;
    uint8_t status;
} endings[] = {
    {"debug exit", {0xba, 0xf4, 0x00, 0xb0, 0x2a, 0xee, 0xf4}, PYHV_STOP_GUEST_EXIT, 42},
    /* mov dx, 0x300; in al, dx; mov dx, 0xf4; out dx, al */
    {"unclaimed port, 8 bits", {0xba, 0x00, 0x03, 0xec, 0xba, 0xf4, 0x00, 0xee}, PYHV_STOP_GUEST_EXIT, 0xff},
    /* mov dx, 0x300; in ax, dx; mov al, ah; mov dx, 0xf4; out dx, al */
    {"unclaimed port, 16 bits",
     {0xba, 0x00, 0x03, 0xed, 0x88, 0xe0, 0xba, 0xf4, 0x00, 0xee},
     PYHV_STOP_GUEST_EXIT,
     0xff},
    /* mov ax, 0x2000; mov ds, ax; mov al, [0]; mov dx, 0xf4; out dx, al */
    {"unclaimed memory",
     {0xb8, 0x00, 0x20, 0x8e, 0xd8, 0xa0, 0x00, 0x00, 0xba, 0xf4, 0x00, 0xee},
     PYHV_STOP_GUEST_EXIT,
     0xff},
    /* mov al, 0xfe; out 0x64, al */
    {"i8042 reset", {0xb0, 0xfe, 0xe6, 0x64, 0xf4}, PYHV_STOP_RESET, 0},
    {"halt", {0xf4}, PYHV_STOP_HALTED, 0},
};

static void endings_as_expected(void)
{
    for (size_t i = 0; i < sizeof endings / sizeof endings[0]; i++) {
        struct machine machine;
        struct pyhv_exit exit;
        build(&machine, endings[i].code, sizeof endings[i].code, 0);
        pyhv_vcpu_run(machine.vcpu, &exit);
        if (exit.stop != endings[i].stop)
            fprintf(stderr, "%s: stop %u, exit reason %u, rip 0x%" PRIx64 ", %s\n", endings[i].name, exit.stop,
                    exit.exit_reason, exit.rip, exit.error.what);
        CHECK_EQUAL(exit.stop, endings[i].stop);
        CHECK_EQUAL(exit.status, endings[i].status);
        destroy(&machine);
    }
}

static void triple_fault(void)
{
    static const uint8_t code[] = {0x0f, 0x0b}; /* ud2 */
    struct machine machine;
    struct pyhv_sregs sregs;
    struct pyhv_error error = {0};
    struct pyhv_exit exit;
    build(&machine, code, sizeof code, 0);
    CHECK_EQUAL(pyhv_vcpu_get_sregs(machine.vcpu, &sregs, &error), 0);
    /* In flat 32-bit protected mode: some KVMs emulate real mode, and take their time for this there. */
    const uint32_t data = 0xc093, code32 = 0xc09b;
    sregs.cs = (struct pyhv_segment){.limit = 0xffffffff, .attributes = code32, .selector = 8};
    sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss =
        (struct pyhv_segment){.limit = 0xffffffff, .attributes = data, .selector = 16};
    sregs.cr0 |= 1;
    sregs.idt_limit = 0;
    CHECK_EQUAL(pyhv_vcpu_set_sregs(machine.vcpu, &sregs, &error), 0);
    pyhv_vcpu_run(machine.vcpu, &exit);
    CHECK_EQUAL(exit.stop, PYHV_STOP_TRIPLE_FAULT);
    destroy(&machine);
}

static void console_output(void)
{
    /* mov si, 0x1010; mov cx, 5; mov dx, 0x3f8; rep outsb; mov dx, 0xf4; out dx, al */
    static const uint8_t code[] = {0xbe, 0x10, 0x10, 0xb9, 0x05, 0x00, 0xba, 0xf8, 0x03, 0xf3, 0x6e,
                                   0xba, 0xf4, 0x00, 0xee, 0xf4, 'h',  'e',  'l',  'l',  'o'};
    struct machine machine;
    struct pyhv_exit exit;
    char text[16] = "";
    build(&machine, code, sizeof code, 0);
    pyhv_vcpu_run(machine.vcpu, &exit);
    CHECK_EQUAL(exit.stop, PYHV_STOP_GUEST_EXIT);
    CHECK_EQUAL(read(machine.console[0], text, sizeof text), 5);
    CHECK(strcmp(text, "hello") == 0);
    destroy(&machine);
}

/* --------------------------------------------------------------------------------------------- the kick -- */

static void *kick_soon(void *argument)
{
    nanosleep(&(struct timespec){.tv_nsec = 20000000}, NULL);
    CHECK_EQUAL(pyhv_vcpu_kick(argument, NULL), 0);
    return NULL;
}

static void kicks(int irqchip, const uint8_t *code, size_t size)
{
    struct machine machine;
    struct pyhv_exit exit;
    pthread_t thread;
    build(&machine, code, size, irqchip);

    for (int round = 0; round < 3; round++) {
        pthread_create(&thread, NULL, kick_soon, machine.vcpu);
        pyhv_vcpu_run(machine.vcpu, &exit);
        pthread_join(thread, NULL);
        CHECK_EQUAL(exit.stop, PYHV_STOP_KICKED);
    }
    /* In front of the run: not lost, and only one run is ended by it. */
    CHECK_EQUAL(pyhv_vcpu_kick(machine.vcpu, NULL), 0);
    pyhv_vcpu_run(machine.vcpu, &exit);
    CHECK_EQUAL(exit.stop, PYHV_STOP_KICKED);
    pthread_create(&thread, NULL, kick_soon, machine.vcpu);
    pyhv_vcpu_run(machine.vcpu, &exit);
    pthread_join(thread, NULL);
    CHECK_EQUAL(exit.stop, PYHV_STOP_KICKED);
    destroy(&machine);
}

/* A signal that is blocked where the run is called from must still get through, and be blocked again afterwards. */
static void kick_with_blocked_signals(void)
{
    static const uint8_t spin[] = {0xeb, 0xfe};
    sigset_t all, before, now;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    kicks(0, spin, sizeof spin);
    pthread_sigmask(SIG_SETMASK, NULL, &now);
    CHECK_EQUAL(sigismember(&now, SIGURG), 1);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

/* Where the queue of signals has no room (RLIMIT_SIGPENDING), a real-time signal is refused. */
static void kicks_without_a_queue(void)
{
    static const uint8_t spin[] = {0xeb, 0xfe}, sleep_for_ever[] = {0xfa, 0xf4, 0xeb, 0xfc};
    struct rlimit before, none;
    getrlimit(RLIMIT_SIGPENDING, &before);
    none = (struct rlimit){.rlim_cur = 0, .rlim_max = before.rlim_max};
    setrlimit(RLIMIT_SIGPENDING, &none);
    kicks(0, spin, sizeof spin);
    kicks(1, sleep_for_ever, sizeof sleep_for_ever);
    setrlimit(RLIMIT_SIGPENDING, &before);
}

/* -------------------------------------------------------------------------------------- what can wake it -- */

static void *run_on(void *argument)
{
    struct pyhv_exit exit;
    pyhv_vcpu_run(argument, &exit);
    CHECK_EQUAL(exit.stop, PYHV_STOP_KICKED);
    return NULL;
}

/* A vCPU that runs is asked: it goes on, and no kick comes of it. */
static void looks_at_running_vcpus(void)
{
    static const uint8_t spin[] = {0xeb, 0xfe}, halt[] = {0xfa, 0xf4, 0xeb, 0xfd}, wait[] = {0xfb, 0xf4, 0xeb, 0xfd};
    const struct {
        const uint8_t *code;
        size_t size;
        bool reaches; /* what it says in the end, when it has come to its HLT */
        unsigned nmi_pin;
    } cases[] = {
        {spin, sizeof spin, false, 0},
        {halt, sizeof halt, true, 0},
        {wait, sizeof wait, false, 0},
        {halt, sizeof halt, false, 4},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct machine machine;
        struct pyhv_error error = {0};
        struct pyhv_irqchip chips;
        pthread_t thread;
        build(&machine, cases[i].code, cases[i].size, 1);
        if (cases[i].nmi_pin) {
            CHECK_EQUAL(kvm_get_irqchip(machine.vm, &chips, &error), 0);
            chips.ioapic.redirection[cases[i].nmi_pin] = 4 << 8; /* not masked, an NMI */
            CHECK_EQUAL(kvm_set_irqchip(machine.vm, &chips, &error), 0);
        }
        CHECK_EQUAL(pyhv_vcpu_waits_for_ever(machine.vcpu, &error), 0); /* has not begun */
        pthread_create(&thread, NULL, run_on, machine.vcpu);
        int waits = 0;
        for (int tries = 0; tries < 2000 && !waits; tries++) {
            waits = pyhv_vcpu_waits_for_ever(machine.vcpu, &error);
            if (!cases[i].reaches && tries == 50)
                break;
            usleep(1000); /* where there is one processor, the vCPU needs it too */
        }
        CHECK_EQUAL(waits, cases[i].reaches);
        CHECK_EQUAL(pyhv_vcpu_kick(machine.vcpu, NULL), 0);
        pthread_join(thread, NULL);
        CHECK_EQUAL(pyhv_vcpu_waits_for_ever(machine.vcpu, &error), cases[i].reaches); /* the same of one that stands */
        destroy(&machine);
    }
}

/* A run may begin while somebody looks at the vCPU: who looks must not wait in the kernel until that run ends. */
enum { BEGINNINGS = 300 };

static void *run_again(void *argument)
{
    struct pyhv_exit exit;
    for (int i = 0; i < BEGINNINGS; i++)
        pyhv_vcpu_run(argument, &exit);
    return NULL;
}

static void looks_as_a_run_begins(void)
{
    static const uint8_t spin[] = {0xeb, 0xfe};
    struct machine machine;
    struct pyhv_error error = {0};
    pthread_t thread;
    build(&machine, spin, sizeof spin, 1);
    pthread_create(&thread, NULL, run_again, machine.vcpu);
    while (pthread_tryjoin_np(thread, NULL)) {
        pyhv_vcpu_kick(machine.vcpu, NULL);
        for (int i = 0; i < 4; i++)
            CHECK_EQUAL(pyhv_vcpu_waits_for_ever(machine.vcpu, &error), 0);
    }
    destroy(&machine);
}

/* ------------------------------------------------------------------------------------ stepping and traps -- */

static void steps(void)
{
    static const uint8_t code[] = {0x40, 0x40, 0xb0, 0x07, 0xe6, 0xf4}; /* inc ax; inc ax; mov al, 7; out 0xf4, al */
    struct machine machine;
    struct pyhv_exit exit;
    struct pyhv_error error = {0};
    struct pyhv_regs regs;
    build(&machine, code, sizeof code, 0);
    static const uint64_t rips[] = {ENTRY + 1, ENTRY + 2, ENTRY + 4};
    for (int i = 0; i < 3; i++) {
        pyhv_vcpu_step(machine.vcpu, &exit);
        CHECK_EQUAL(exit.stop, PYHV_STOP_DEBUG);
        CHECK_EQUAL(exit.rip, rips[i]);
    }
    CHECK_EQUAL(pyhv_vcpu_get_regs(machine.vcpu, &regs, &error), 0);
    CHECK_EQUAL(regs.rax & 0xffff, 7);
    pyhv_vcpu_step(machine.vcpu, &exit);
    CHECK_EQUAL(exit.stop, PYHV_STOP_GUEST_EXIT);
    CHECK_EQUAL(exit.status, 7);
    destroy(&machine);
}

/* mov eax, 7; xor ecx, ecx; cpuid (with a prefix); mov al, bl; mov dx, 0x300; out dx, al; mov eax, 1; cpuid;
 * out 0xf4, al. The first CPUID stands at offset 9, the second, right behind a port access, at offset 24. */
static const uint8_t ask_twice[] = {0x66, 0xb8, 0x07, 0x00, 0x00, 0x00, 0x66, 0x31, 0xc9, 0x66,
                                    0x0f, 0xa2, 0x88, 0xd8, 0xba, 0x00, 0x03, 0x66, 0xb8, 0x01,
                                    0x00, 0x00, 0x00, 0xee, 0x0f, 0xa2, 0xe6, 0xf4, 0xf4};
enum { FIRST_SITE = ENTRY + 9, SECOND_SITE = ENTRY + 24 };

static void traps(uint32_t site_count, uint32_t log_capacity)
{
    struct machine machine;
    struct pyhv_cpuid_table table;
    struct pyhv_cpuid_record records[4];
    struct pyhv_error error = {0};
    struct pyhv_exit exit;
    struct pyhv_trap_config config = {
        .table = &table,
        .site_count = site_count,
        .log_capacity = log_capacity,
        .sites = {FIRST_SITE, SECOND_SITE},
    };
    build(&machine, ask_twice, sizeof ask_twice, 0);
    CHECK_EQUAL(pyhv_cpuid_table_init(&table, table_entries, TABLE_COUNT, &error), 0);
    CHECK_EQUAL(pyhv_vcpu_trap(machine.vcpu, &config, &error), 0);
    size_t logged = 0;
    do {
        pyhv_vcpu_run(machine.vcpu, &exit);
        logged += pyhv_vcpu_trap_log(machine.vcpu, records + logged, 4 - logged);
    } while (exit.stop == PYHV_STOP_TRAP_LOG_FULL);
    CHECK_EQUAL(exit.stop, PYHV_STOP_GUEST_EXIT);
    CHECK_EQUAL(exit.status, 0x80); /* AL of leaf 1 */
    CHECK_EQUAL(pyhv_vcpu_counters(machine.vcpu)->cpuid_answered, 2);
    CHECK_EQUAL(logged, log_capacity ? 2 : 0);
    if (logged == 2) {
        CHECK_EQUAL(records[0].rip, FIRST_SITE);
        CHECK_EQUAL(records[0].leaf, 7);
        CHECK_EQUAL(records[0].guest[1], 0x11111111);
        CHECK_EQUAL(records[1].rip, SECOND_SITE);
        CHECK_EQUAL(records[1].leaf, 1);
        CHECK_EQUAL(records[1].guest[3] & ~0x200u, 0x078bf9ffu);
    }
    destroy(&machine);
}

/* An instruction that is answered never enters KVM_RUN, which would notice the kick. */
static void kick_among_cpuids(void)
{
    uint8_t code[2000];
    for (size_t i = 0; i < sizeof code; i += 2)
        memcpy(code + i, "\x0f\xa2", 2);
    struct machine machine;
    struct pyhv_cpuid_table table;
    struct pyhv_error error = {0};
    struct pyhv_exit exit;
    struct pyhv_trap_config config = {.table = &table};
    build(&machine, code, sizeof code, 0);
    CHECK_EQUAL(pyhv_cpuid_table_init(&table, table_entries, TABLE_COUNT, &error), 0);
    CHECK_EQUAL(pyhv_vcpu_trap(machine.vcpu, &config, &error), 0);
    CHECK_EQUAL(pyhv_vcpu_kick(machine.vcpu, &error), 0);
    pyhv_vcpu_run(machine.vcpu, &exit);
    CHECK_EQUAL(exit.stop, PYHV_STOP_KICKED);
    CHECK_EQUAL(exit.rip, ENTRY);
    destroy(&machine);
}

/* A guest that waits for an interrupt, by a loop or by HLT: held back by the stepping it would wait for ever. */
static void stepping_refuses_interrupts(void)
{
    /* sti; 1: jmp 1b, and 1: sti; hlt; cli; jmp 1b */
    static const uint8_t loop[] = {0xfb, 0xeb, 0xfe}, sleep[] = {0xfb, 0xf4, 0xfa, 0xeb, 0xfb};
    for (int which = 0; which < 2; which++)
        for (int through_pic = 0; through_pic < 2; through_pic++) {
            struct machine machine;
            struct pyhv_cpuid_table table;
            struct pyhv_error error = {0};
            struct pyhv_exit exit;
            struct pyhv_irqchip chips;
            struct pyhv_trap_config config = {.table = &table};
            build(&machine, which ? sleep : loop, which ? sizeof sleep : sizeof loop, 1);
            CHECK_EQUAL(pyhv_cpuid_table_init(&table, table_entries, TABLE_COUNT, &error), 0);
            CHECK_EQUAL(pyhv_vcpu_trap(machine.vcpu, &config, &error), 0);
            CHECK_EQUAL(kvm_get_irqchip(machine.vm, &chips, &error), 0);
            if (through_pic) {
                chips.pic[0].irr = 1 << 4;
            } else {
                uint8_t lapic[PYHV_LAPIC_SIZE];
                CHECK_EQUAL(kvm_get_lapic(machine.vcpu, lapic, &error), 0);
                lapic[0xf1] = 1;    /* enabled by software */
                lapic[0x220] = 0x1; /* vector 0x40 waits */
                CHECK_EQUAL(kvm_set_lapic(machine.vcpu, lapic, &error), 0);
            }
            CHECK_EQUAL(kvm_set_irqchip(machine.vm, &chips, &error), 0);
            pyhv_vcpu_run(machine.vcpu, &exit);
            CHECK_EQUAL(exit.stop, PYHV_STOP_TRAP_EVENT);
            CHECK(exit.rip >= ENTRY && exit.rip < ENTRY + 5);
            destroy(&machine);
        }
}

static void trap_on_the_wrong_address(void)
{
    struct machine machine;
    struct pyhv_cpuid_table table;
    struct pyhv_error error = {0};
    struct pyhv_exit exit;
    struct pyhv_trap_config config = {.table = &table, .site_count = 1, .sites = {FIRST_SITE - 3}};
    build(&machine, ask_twice, sizeof ask_twice, 0);
    CHECK_EQUAL(pyhv_cpuid_table_init(&table, table_entries, TABLE_COUNT, &error), 0);
    CHECK_EQUAL(pyhv_vcpu_trap(machine.vcpu, &config, &error), 0);
    pyhv_vcpu_run(machine.vcpu, &exit);
    CHECK_EQUAL(exit.stop, PYHV_STOP_TRAP_LOST);
    CHECK_EQUAL(exit.rip, FIRST_SITE - 3);
    CHECK_EQUAL(exit.bytes_count, 16);
    CHECK(memcmp(exit.bytes, ask_twice + 6, 16) == 0);
    config.site_count = PYHV_TRAP_MAX_SITES + 1;
    CHECK_EQUAL(pyhv_vcpu_trap(machine.vcpu, &config, &error), -1);
    destroy(&machine);
}

/* ---------------------------------------------------------------------------------- state and failures -- */

static void state_written_back_is_unchanged(void)
{
    struct machine machine;
    struct pyhv_error error = {0};
    struct pyhv_sregs before, after;
    struct pyhv_regs regs_before, regs_after;
    build(&machine, "\xf4", 1, 1);
    CHECK_EQUAL(pyhv_vcpu_get_sregs(machine.vcpu, &before, &error), 0);
    CHECK_EQUAL(pyhv_vcpu_set_sregs(machine.vcpu, &before, &error), 0);
    CHECK_EQUAL(pyhv_vcpu_get_sregs(machine.vcpu, &after, &error), 0);
    CHECK(memcmp(&before, &after, sizeof before) == 0);
    CHECK_EQUAL(pyhv_vcpu_get_regs(machine.vcpu, &regs_before, &error), 0);
    regs_before.rax = UINT64_C(0x0123456789abcdef);
    regs_before.r15 = UINT64_C(0xfedcba9876543210);
    CHECK_EQUAL(pyhv_vcpu_set_regs(machine.vcpu, &regs_before, &error), 0);
    CHECK_EQUAL(pyhv_vcpu_get_regs(machine.vcpu, &regs_after, &error), 0);
    CHECK(memcmp(&regs_before, &regs_after, sizeof regs_before) == 0);
    CHECK(kvm_get_mp_state(machine.vcpu, &error) >= 0);
    CHECK(pyhv_vcpu_get_tsc_khz(machine.vcpu, &error) > 0);
    destroy(&machine);
}

/* What KVM has in 8 or 16 bits is not cut to them. */
static void numbers_that_do_not_fit_are_refused(void)
{
    struct machine machine;
    struct pyhv_error error = {0};
    struct pyhv_events events, changed;
    struct pyhv_sregs sregs, other;
    struct pyhv_irqchip irqchip;
    build(&machine, "\xf4", 1, 1);
    CHECK_EQUAL(kvm_get_events(machine.vcpu, &events, &error), 0);
    static const struct {
        const char *name;
        size_t offset;
    } fields[] = {
#define FIELD(name) {#name, offsetof(struct pyhv_events, name)}
        FIELD(exception_injected),
        FIELD(exception_pending),
        FIELD(exception_vector),
        FIELD(exception_has_error),
        FIELD(exception_has_payload),
        FIELD(interrupt_injected),
        FIELD(interrupt_vector),
        FIELD(interrupt_soft),
        FIELD(interrupt_shadow),
        FIELD(nmi_injected),
        FIELD(nmi_pending),
        FIELD(nmi_masked),
        FIELD(smm),
        FIELD(smi_pending),
        FIELD(smm_inside_nmi),
        FIELD(latched_init),
        FIELD(triple_fault_pending),
#undef FIELD
    };
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++) {
        changed = events;
        memcpy((char *)&changed + fields[i].offset, &(uint32_t){0x100}, sizeof(uint32_t));
        error = (struct pyhv_error){0};
        CHECK_EQUAL(kvm_set_events(machine.vcpu, &changed, &error), -1);
        CHECK_EQUAL(error.errnum, ERANGE);
        CHECK(strncmp(error.detail, fields[i].name, strlen(fields[i].name)) == 0);
    }
    CHECK_EQUAL(pyhv_vcpu_get_sregs(machine.vcpu, &sregs, &error), 0);
    other = sregs;
    other.gs.selector = 0x10000;
    CHECK_EQUAL(pyhv_vcpu_set_sregs(machine.vcpu, &other, &error), -1);
    CHECK(strncmp(error.detail, "gs: selector 0x10000", 20) == 0);
    other = sregs;
    other.tr.attributes |= 1 << 8;
    CHECK_EQUAL(pyhv_vcpu_set_sregs(machine.vcpu, &other, &error), -1);
    CHECK_EQUAL(error.errnum, ERANGE);
    other = sregs;
    other.idt_limit = 0x10000;
    CHECK_EQUAL(pyhv_vcpu_set_sregs(machine.vcpu, &other, &error), -1);
    CHECK(strncmp(error.detail, "idt_limit is 0x10000", 20) == 0);
    CHECK_EQUAL(kvm_get_irqchip(machine.vm, &irqchip, &error), 0);
    irqchip.pit[1].latched_count = 0x10000;
    CHECK_EQUAL(kvm_set_irqchip(machine.vm, &irqchip, &error), -1);
    CHECK_EQUAL(error.errnum, ERANGE);
    destroy(&machine);
}

static void pending_triple_fault(void)
{
    struct machine machine;
    struct pyhv_error error = {0};
    struct pyhv_events events;
    struct pyhv_exit exit;
    build(&machine, "\xf4", 1, 0);
    CHECK_EQUAL(kvm_get_events(machine.vcpu, &events, &error), 0);
    CHECK_EQUAL(events.triple_fault_pending, 0);
    events.triple_fault_pending = 1;
    int there = syscall(SYS_ioctl, kvm_fd, KVM_CHECK_EXTENSION, KVM_CAP_X86_TRIPLE_FAULT_EVENT) > 0;
    CHECK_EQUAL(kvm_set_events(machine.vcpu, &events, &error), there ? 0 : -1);
    if (there) {
        events.triple_fault_pending = 0;
        CHECK_EQUAL(kvm_get_events(machine.vcpu, &events, &error), 0);
        CHECK_EQUAL(events.triple_fault_pending, 1);
        pyhv_vcpu_run(machine.vcpu, &exit);
        CHECK_EQUAL(exit.stop, PYHV_STOP_TRIPLE_FAULT);
    }
    destroy(&machine);
}

static void a_tsc_rate_that_is_refused(void)
{
    struct machine machine;
    struct pyhv_error error = {0};
    build(&machine, "\xf4", 1, 0);
    other_host.on = 1;
    other_host.scales = 0;
    CHECK_EQUAL(kvm_set_tsc_khz(machine.vcpu, 1234567, &error), 1);
    CHECK_EQUAL(other_host.rates, 0);
    other_host.scales = 1;
    CHECK_EQUAL(kvm_set_tsc_khz(machine.vcpu, 1234567, &error), -1);
    CHECK(strcmp(error.what, "KVM_SET_TSC_KHZ") == 0);
    CHECK_EQUAL(error.errnum, EINVAL);
    other_host.on = 0;
    destroy(&machine);
}

/* Before the first vCPU, for it is refused later (api.rst, KVM_CAP_PMU_CAPABILITY). */
static void no_pmu(void)
{
    struct machine machine;
    other_host.on = 1;
    build(&machine, "\xf4", 1, 0);
    other_host.on = 0;
    CHECK_EQUAL(other_host.vcpus, 1);
    CHECK_EQUAL(other_host.pmu_off, 1);
    destroy(&machine);
}

/* KVM_X86_REG_KVM(KVM_REG_GUEST_SSP) is this number (Linux 6.18, arch/x86/include/uapi/asm/kvm.h). */
static void shadow_stack_pointer(void)
{
    struct machine machine;
    struct pyhv_error error = {0};
    uint64_t value = 0;
    build(&machine, "\xf4", 1, 0);
    other_host.on = 1;
    CHECK_EQUAL(kvm_get_ssp(machine.vcpu, &value, &error), 1);
    CHECK_EQUAL(kvm_set_ssp(machine.vcpu, 0x1238, &error), -1);
    CHECK(strcmp(error.what, "KVM_SET_ONE_REG") == 0);
    other_host.ssp_id = UINT64_C(0x2030000300000000);
    CHECK_EQUAL(kvm_set_ssp(machine.vcpu, 0x1238, &error), 0);
    CHECK_EQUAL(kvm_get_ssp(machine.vcpu, &value, &error), 0);
    CHECK_EQUAL(value, 0x1238);
    other_host.on = 0;
    destroy(&machine);
}

/* A state of the other host's goes through its calls, in which what is granted is, and nothing else. */
static void states(void)
{
    static const uint8_t code[] = {0xf4};
    static const struct pyhv_msr_rule rules[] = {
        {.index = 0x10, .name = "IA32_TSC"},
        {.index = 0x174, .name = "IA32_SYSENTER_CS"},
        {.index = PYHV_MSR_SSP, .flags = PYHV_MSR_UNUSUAL | PYHV_MSR_UNSURE, .name = "SSP"},
    };
    struct machine from, to;
    struct pyhv_error error = {0};
    struct pyhv_vcpu_state *vcpu = calloc(1, sizeof *vcpu);
    struct pyhv_state state = {.vcpu_count = 1, .vcpus = vcpu};
    const uint32_t index = 0x174;
    uint64_t value = 0x10;
    build(&from, code, sizeof code, 1);
    build(&to, code, sizeof code, 1);
    CHECK_EQUAL(pyhv_vcpu_grant(from.vcpu, rules, 3, 3, &error), 0);
    CHECK_EQUAL(pyhv_vcpu_grant(to.vcpu, rules, 3, 3, &error), 0);
    CHECK_EQUAL(pyhv_vcpu_set_msrs(from.vcpu, &index, &value, 1, &error), 1);
    other_host.on = 1;
    other_host.scales = 0;
    other_host.ssp_id = UINT64_C(0x2030000300000000);
    other_host.ssp = 0;
    CHECK_EQUAL(pyhv_vm_save_state(from.vm, &state, &error), 0);
    CHECK_EQUAL(vcpu->msr_count, 2);
    CHECK_EQUAL(state.has_irqchip, 1);
    CHECK_EQUAL(vcpu->lapic_size, PYHV_LAPIC_SIZE);
    other_host.ssp = 0x1238;
    CHECK_EQUAL(pyhv_vm_save_state(from.vm, &state, &error), 0);
    CHECK_EQUAL(vcpu->msr_count, 3);
    CHECK_EQUAL(vcpu->msr_indices[1], 0x174);
    CHECK_EQUAL(vcpu->msr_values[1], 0x10);
    CHECK_EQUAL(vcpu->msr_values[2], 0x1238);
    other_host.ssp = 0;
    vcpu->regs.rbx = 0x4711;
    CHECK_EQUAL(pyhv_vm_load_state(to.vm, &state, 1000000, &error), 0);
    CHECK_EQUAL(other_host.ssp, 0x1238);
    CHECK_EQUAL(pyhv_vcpu_get_msrs(to.vcpu, &index, &value, 1, &error), 1);
    CHECK_EQUAL(value, 0x10);
    struct pyhv_regs regs;
    CHECK_EQUAL(pyhv_vcpu_get_regs(to.vcpu, &regs, &error), 0);
    CHECK_EQUAL(regs.rbx, 0x4711);
    /* What was promised must be kept: another rate on a host that scales. */
    state.tsc_khz++;
    CHECK_EQUAL(pyhv_vm_load_state(to.vm, &state, 0, &error), 0);
    other_host.scales = 1;
    CHECK_EQUAL(pyhv_vm_load_state(to.vm, &state, 0, &error), -1);
    CHECK(strcmp(error.what, "KVM_SET_TSC_KHZ") == 0);
    other_host.on = 0;
    state.tsc_khz--;
    vcpu->msr_indices[1] = 0x175;
    CHECK_EQUAL(pyhv_vm_load_state(to.vm, &state, 0, &error), -1);
    CHECK_EQUAL(error.errnum, EPERM);
    CHECK(strstr(error.detail, "0x175") != NULL);
    vcpu->msr_count = PYHV_STATE_MSRS_MAX + 1;
    CHECK_EQUAL(pyhv_vm_load_state(to.vm, &state, 0, &error), -1);
    CHECK_EQUAL(error.errnum, ERANGE);
    vcpu->msr_count = 0;
    vcpu->lapic_size = 0;
    CHECK_EQUAL(pyhv_vm_load_state(to.vm, &state, 0, &error), -1);
    CHECK(strcmp(error.what, "KVM_SET_LAPIC") == 0);
    state.vcpu_count = 2;
    CHECK_EQUAL(pyhv_vm_load_state(to.vm, &state, 0, &error), -1);
    CHECK_EQUAL(pyhv_vm_save_state(to.vm, &state, &error), -1);
    destroy(&from);
    destroy(&to);
    free(vcpu);
}

static void failures_are_named(void)
{
    struct machine machine;
    struct pyhv_error error = {0};
    struct pyhv_memory memory;
    build(&machine, "\xf4", 1, 0);
    CHECK(pyhv_vcpu_create(machine.vm, 0, &error) == NULL);
    CHECK(strcmp(error.what, "KVM_CREATE_VCPU") == 0);
    CHECK_EQUAL(error.errnum, EEXIST);
    CHECK_EQUAL(pyhv_vm_map(machine.vm, 0x1000, 0x1000, machine.memory.host, &error), -1);
    CHECK(strcmp(error.what, "KVM_SET_USER_MEMORY_REGION") == 0);
    CHECK_EQUAL(pyhv_memory_create(&memory, 0, &error), -1);
    CHECK_EQUAL(pyhv_memory_create(&memory, 4097, &error), -1);
    CHECK_EQUAL(pyhv_memory_create(&memory, UINT64_C(1) << 62, &error), -1);
    pyhv_memory_destroy(&memory);
    CHECK_EQUAL(pyhv_kvm_open("/dev/null", &error), -1);
    CHECK(strcmp(error.what, "KVM_GET_API_VERSION") == 0);
    CHECK_EQUAL(pyhv_kvm_open("/nowhere", &error), -1);
    CHECK_EQUAL(error.errnum, ENOENT);
    destroy(&machine);
}

/* The code's page, which is never written: KVM may map a page writable that is only read, and count it as dirty then. */
#define CODE_PAGE (UINT64_C(1) << ENTRY / 0x1000)

/* Which pages a guest writes, with a slot more that it does not touch. */
static void dirty_pages(void)
{
    /* mov byte [0x3000], 1; mov byte [0x5fff], 1; mov dx, 0xf4; out dx, al; then the same without the first */
    static const uint8_t code[] = {0xc6, 0x06, 0x00, 0x30, 0x01, 0xc6, 0x06, 0xff, 0x5f, 0x01,
                                   0xba, 0xf4, 0x00, 0xee, 0xc6, 0x06, 0xff, 0x5f, 0x02, 0xee};
    struct machine machine;
    struct pyhv_error error = {0};
    struct pyhv_exit exit;
    struct pyhv_memory more, small;
    uint64_t bitmap[3] = {0};
    build(&machine, code, sizeof code, 0);
    CHECK_EQUAL(pyhv_vm_take_dirty(machine.vm, bitmap, &error), -1);
    CHECK_EQUAL(error.errnum, EINVAL);
    /* The first slot has 16 pages: another one's bits would begin within a word. */
    CHECK_EQUAL(pyhv_memory_create(&small, 0x1000, &error), 0);
    CHECK_EQUAL(pyhv_vm_log_dirty(machine.vm, 1, &error), 0);
    CHECK_EQUAL(pyhv_vm_map(machine.vm, 0x100000, small.size, small.host, &error), -1);
    CHECK_EQUAL(error.errnum, EBUSY);
    CHECK_EQUAL(pyhv_vm_log_dirty(machine.vm, 1, &error), 0); /* it is on */

    pyhv_vcpu_run(machine.vcpu, &exit);
    CHECK_EQUAL(exit.stop, PYHV_STOP_GUEST_EXIT);
    bitmap[0] = UINT64_C(1) << 63; /* what is set stays */
    CHECK_EQUAL(pyhv_vm_take_dirty(machine.vm, bitmap, &error), 0);
    CHECK_EQUAL(bitmap[0] & ~CODE_PAGE, UINT64_C(1) << 63 | 1 << 3 | 1 << 5);
    CHECK_EQUAL(bitmap[1] | bitmap[2], 0);
    bitmap[0] = 0;
    CHECK_EQUAL(pyhv_vm_take_dirty(machine.vm, bitmap, &error), 0); /* each page is told once */
    CHECK_EQUAL(bitmap[0], 0);
    pyhv_vcpu_run(machine.vcpu, &exit);
    CHECK_EQUAL(pyhv_vm_take_dirty(machine.vm, bitmap, &error), 0);
    CHECK_EQUAL(bitmap[0] & ~CODE_PAGE, 1 << 5);

    CHECK_EQUAL(pyhv_vm_log_dirty(machine.vm, 0, &error), 0);
    CHECK_EQUAL(pyhv_vm_take_dirty(machine.vm, bitmap, &error), -1);
    CHECK_EQUAL(pyhv_vm_map(machine.vm, 0x100000, small.size, small.host, &error), 0);
    CHECK_EQUAL(pyhv_vm_log_dirty(machine.vm, 1, &error), -1);
    CHECK_EQUAL(error.errnum, EINVAL);
    destroy(&machine);
    pyhv_memory_destroy(&small);

    /* Two slots: the second one's bits follow the first one's, and its last word is not full. */
    struct pyhv_vm_config config = {0};
    struct pyhv_vm *vm = pyhv_kvm_vm_create(kvm_fd, &config, NULL, &error);
    CHECK_EQUAL(pyhv_memory_create(&small, 64 * 0x1000, &error), 0);
    CHECK_EQUAL(pyhv_memory_create(&more, 65 * 0x1000, &error), 0);
    CHECK_EQUAL(pyhv_vm_map(vm, 0x400000, small.size, small.host, &error), 0);
    CHECK_EQUAL(pyhv_vm_map(vm, 0, more.size, more.host, &error), 0);
    memcpy(more.host + ENTRY, code, 10);
    more.host[ENTRY + 10] = 0xf4; /* hlt */
    struct pyhv_vcpu *vcpu = pyhv_vcpu_create(vm, 0, &error);
    struct pyhv_sregs sregs;
    struct pyhv_regs regs = {.rip = ENTRY, .rflags = 2};
    CHECK_EQUAL(pyhv_vcpu_get_sregs(vcpu, &sregs, &error), 0);
    sregs.cs.base = sregs.cs.selector = 0;
    sregs.ds.base = 0x40000 - 0x5000; /* the first byte goes to 0x3e000, the second to 0x40fff: the last page */
    CHECK_EQUAL(pyhv_vcpu_set_sregs(vcpu, &sregs, &error), 0);
    CHECK_EQUAL(pyhv_vcpu_set_regs(vcpu, &regs, &error), 0);
    CHECK_EQUAL(pyhv_vm_log_dirty(vm, 1, &error), 0);
    pyhv_vcpu_run(vcpu, &exit);
    memset(bitmap, 0, sizeof bitmap);
    CHECK_EQUAL(pyhv_vm_take_dirty(vm, bitmap, &error), 0);
    CHECK_EQUAL(bitmap[0], 0);
    CHECK_EQUAL(bitmap[1] & ~CODE_PAGE, UINT64_C(1) << 62);
    CHECK_EQUAL(bitmap[2], 1);
    CHECK(more.host[0x3e000] == 1 && more.host[0x40fff] == 1);
    pyhv_vcpu_destroy(vcpu);
    pyhv_vm_destroy(vm);
    pyhv_memory_destroy(&small);
    pyhv_memory_destroy(&more);
}

/* A VM that was begun before it was known what it is for. */
static void pit_later(void)
{
    struct pyhv_error error;
    const struct pyhv_vm_config plain = {.irqchip = 1}, without = {0};
    struct pyhv_vm *vm = pyhv_kvm_vm_create(kvm_fd, &plain, NULL, &error);
    struct pyhv_bus *bus = pyhv_bus_create(&error);
    struct pyhv_irqchip state = {0};
    CHECK_EQUAL(kvm_get_irqchip(vm, &state, &error), 0);
    CHECK_EQUAL(state.pit[0].gate, 0); /* zeros without a PIT */
    CHECK_EQUAL(pyhv_kvm_vm_adopt(vm, bus, 1, &error), 0);
    CHECK_EQUAL(kvm_get_irqchip(vm, &state, &error), 0);
    CHECK_EQUAL(state.pit[0].gate, 1);
    CHECK_EQUAL(pyhv_kvm_vm_adopt(vm, bus, 1, &error), -1);
    CHECK_EQUAL(error.errnum, EINVAL);
    pyhv_vm_destroy(vm);

    vm = pyhv_kvm_vm_create(kvm_fd, &without, NULL, &error);
    CHECK_EQUAL(pyhv_kvm_vm_adopt(vm, bus, 1, &error), -1);
    CHECK_EQUAL(error.errnum, EINVAL);
    pyhv_vm_destroy(vm);
    pyhv_bus_destroy(bus);
}

static void system_questions(void)
{
    struct pyhv_cpuid_entry entries[PYHV_CPUID_MAX_ENTRIES];
    struct pyhv_error error = {0};
    uint32_t indices[2048];
    uint64_t value;
    CHECK(pyhv_kvm_supported_cpuid(kvm_fd, entries, PYHV_CPUID_MAX_ENTRIES, &error) > 2);
    CHECK_EQUAL(pyhv_kvm_supported_cpuid(kvm_fd, entries, 1, &error), -1);
    CHECK(pyhv_kvm_msr_list(kvm_fd, 0, indices, 2048, &error) > 5);
    CHECK(pyhv_kvm_msr_list(kvm_fd, 1, indices, 2048, &error) >= 0);
    CHECK_EQUAL(pyhv_kvm_feature_msr(kvm_fd, 0xffffffff, &value, &error), -1);
}

int main(void)
{
    static const uint8_t spin[] = {0xeb, 0xfe};
    static const uint8_t sleep_for_ever[] = {0xfa, 0xf4, 0xeb, 0xfc};
    struct pyhv_error error = {0};

    if (access("/dev/kvm", R_OK | W_OK) < 0) {
        printf("test_kvm: skipped: /dev/kvm: %s\n", strerror(errno));
        return 0;
    }
    kvm_fd = pyhv_kvm_open("/dev/kvm", &error);
    if (kvm_fd < 0)
        fatal("/dev/kvm", &error);
    alarm(TIMEOUT_SECONDS); /* a lost kick must not hang the tests */
    signal(SIGPIPE, SIG_IGN);

    endings_as_expected();
    triple_fault();
    console_output();
    kicks(0, spin, sizeof spin);
    kicks(1, sleep_for_ever, sizeof sleep_for_ever);
    kick_with_blocked_signals();
    kicks_without_a_queue();
    looks_at_running_vcpus();
    looks_as_a_run_begins();
    kick_among_cpuids();
    stepping_refuses_interrupts();
    steps();
    for (uint32_t capacity = 0; capacity <= 2; capacity++) {
        traps(2, capacity);
        traps(0, capacity);
    }
    trap_on_the_wrong_address();
    state_written_back_is_unchanged();
    numbers_that_do_not_fit_are_refused();
    pending_triple_fault();
    a_tsc_rate_that_is_refused();
    shadow_stack_pointer();
    states();
    no_pmu();
    failures_are_named();
    dirty_pages();
    pit_later();
    system_questions();
    close(kvm_fd);
    return check_report("test_kvm");
}
