/* SPDX-License-Identifier: MIT
 *
 * The peer of the rows `restore`: a C program that makes the KVM calls that pyhv makes from Machine.restore() to the
 * guest's first exit, in the same order, on the same file, which it maps privately as pyhv does. It decodes nothing,
 * checks and compares nothing: the state that it sets is that of a VM which it made once, at its start. So it is what
 * the kernel alone takes.
 *
 * usage: peer_restore FILE MEMORY_OFFSET RAM_BYTES RIP STATUS CPUID MSRS    STATUS: the byte that the guest must write
 * to port 0xf4; CPUID: see read_cpuid(); MSRS: a file with the numbers of the saved MSRs, in hexadecimal
 */
#include "peer.h"

enum { IDENTITY_MAP_ADDRESS = 0xfffbc000, TSS_ADDRESS = 0xfffbd000, MSR_TSC = 0x10, MOST_MSRS = 256 };

static const uint64_t low_ram_limit = UINT64_C(3) << 30, high_ram_base = UINT64_C(4) << 30;

static struct cpuid cpuid;
static struct {
    struct kvm_msrs head;
    struct kvm_msr_entry entries[MOST_MSRS];
} msrs;

static const char *path;
static uint64_t memory_offset, ram_size;
static uint8_t expected_status;
static int kvm;

static struct {
    struct kvm_regs regs;
    struct kvm_sregs2 sregs;
    struct kvm_xcrs xcrs;
    struct kvm_xsave xsave;
    struct kvm_lapic_state lapic;
    struct kvm_irqchip irqchips[KVM_NR_IRQCHIPS];
    struct kvm_vcpu_events events;
    struct kvm_debugregs debugregs;
    struct kvm_mp_state mp_state;
    struct kvm_clock_data clock;
    uint64_t tsc;
} saved;

struct vm {
    int fd, vcpu;
    struct kvm_run *run;
    size_t run_size;
};

static void map(int vm, uint32_t slot, uint64_t gpa, uint64_t size, uint8_t *host)
{
    struct kvm_userspace_memory_region region = {
        .slot = slot, .guest_phys_addr = gpa, .memory_size = size, .userspace_addr = (uintptr_t)host};
    need(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region), "KVM_SET_USER_MEMORY_REGION");
}

static struct vm create_vm(uint8_t *ram)
{
    struct vm vm = {.fd = need(ioctl(kvm, KVM_CREATE_VM, 0), "KVM_CREATE_VM")};
    uint64_t identity_map = IDENTITY_MAP_ADDRESS, low = ram_size < low_ram_limit ? ram_size : low_ram_limit;
    need(ioctl(vm.fd, KVM_SET_IDENTITY_MAP_ADDR, &identity_map), "KVM_SET_IDENTITY_MAP_ADDR");
    need(ioctl(vm.fd, KVM_SET_TSS_ADDR, TSS_ADDRESS), "KVM_SET_TSS_ADDR");
    if (ioctl(kvm, KVM_CHECK_EXTENSION, KVM_CAP_EXCEPTION_PAYLOAD) > 0) {
        struct kvm_enable_cap payload = {.cap = KVM_CAP_EXCEPTION_PAYLOAD, .args[0] = 1};
        need(ioctl(vm.fd, KVM_ENABLE_CAP, &payload), "KVM_ENABLE_CAP");
    }
    if (ioctl(kvm, KVM_CHECK_EXTENSION, KVM_CAP_X86_TRIPLE_FAULT_EVENT) > 0) {
        struct kvm_enable_cap event = {.cap = KVM_CAP_X86_TRIPLE_FAULT_EVENT, .args[0] = 1};
        need(ioctl(vm.fd, KVM_ENABLE_CAP, &event), "KVM_ENABLE_CAP");
    }
    if (ioctl(kvm, KVM_CHECK_EXTENSION, KVM_CAP_PMU_CAPABILITY) > 0) {
        struct kvm_enable_cap pmu = {.cap = KVM_CAP_PMU_CAPABILITY, .args[0] = KVM_PMU_CAP_DISABLE};
        need(ioctl(vm.fd, KVM_ENABLE_CAP, &pmu), "KVM_ENABLE_CAP");
    }
    map(vm.fd, 0, 0, low, ram);
    if (ram_size > low)
        map(vm.fd, 1, high_ram_base, ram_size - low, ram + low);
    need(ioctl(vm.fd, KVM_CREATE_IRQCHIP, 0), "KVM_CREATE_IRQCHIP");
    vm.run_size = (size_t)need(ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), "KVM_GET_VCPU_MMAP_SIZE");
    vm.vcpu = need(ioctl(vm.fd, KVM_CREATE_VCPU, 0), "KVM_CREATE_VCPU");
    vm.run = mmap(NULL, vm.run_size, PROT_READ | PROT_WRITE, MAP_SHARED, vm.vcpu, 0);
    if (vm.run == MAP_FAILED)
        fatal("mmap of struct kvm_run");
    struct kvm_enable_cap enforce = {.cap = KVM_CAP_ENFORCE_PV_FEATURE_CPUID, .args[0] = 1};
    need(ioctl(vm.vcpu, KVM_ENABLE_CAP, &enforce), "KVM_ENABLE_CAP");
    need(ioctl(vm.vcpu, KVM_SET_CPUID2, &cpuid), "KVM_SET_CPUID2");
    return vm;
}

static void destroy_vm(const struct vm *vm)
{
    munmap(vm->run, vm->run_size);
    close(vm->vcpu);
    close(vm->fd);
}

static uint64_t read_tsc(int vcpu)
{
    struct {
        struct kvm_msrs head;
        struct kvm_msr_entry entry;
    } tsc = {.head.nmsrs = 1, .entry.index = MSR_TSC};
    if (ioctl(vcpu, KVM_GET_MSRS, &tsc) != 1)
        fatal("KVM_GET_MSRS");
    return tsc.entry.data;
}

static void get_state(const struct vm *vm)
{
    need(ioctl(vm->vcpu, KVM_GET_MP_STATE, &saved.mp_state), "KVM_GET_MP_STATE");
    need(ioctl(vm->vcpu, KVM_GET_REGS, &saved.regs), "KVM_GET_REGS");
    need(ioctl(vm->vcpu, KVM_GET_SREGS2, &saved.sregs), "KVM_GET_SREGS2");
    need(ioctl(vm->vcpu, KVM_GET_XCRS, &saved.xcrs), "KVM_GET_XCRS");
    need(ioctl(vm->vcpu, KVM_GET_XSAVE, &saved.xsave), "KVM_GET_XSAVE");
    need(ioctl(vm->vcpu, KVM_GET_LAPIC, &saved.lapic), "KVM_GET_LAPIC");
    need(ioctl(vm->vcpu, KVM_GET_DEBUGREGS, &saved.debugregs), "KVM_GET_DEBUGREGS");
    need(ioctl(vm->vcpu, KVM_GET_MSRS, &msrs), "KVM_GET_MSRS");
    need(ioctl(vm->vcpu, KVM_GET_VCPU_EVENTS, &saved.events), "KVM_GET_VCPU_EVENTS");
    for (uint32_t id = 0; id < KVM_NR_IRQCHIPS; id++) {
        saved.irqchips[id].chip_id = id;
        need(ioctl(vm->fd, KVM_GET_IRQCHIP, &saved.irqchips[id]), "KVM_GET_IRQCHIP");
    }
    need(ioctl(vm->fd, KVM_GET_CLOCK, &saved.clock), "KVM_GET_CLOCK");
    saved.clock.flags = 0;
    saved.tsc = read_tsc(vm->vcpu);
}

static void set_tsc(int vcpu)
{
    uint64_t offset;
    struct kvm_device_attr attribute = {
        .group = KVM_VCPU_TSC_CTRL, .attr = KVM_VCPU_TSC_OFFSET, .addr = (uintptr_t)&offset};
    need(ioctl(vcpu, KVM_HAS_DEVICE_ATTR, &attribute), "KVM_HAS_DEVICE_ATTR");
    need(ioctl(vcpu, KVM_GET_DEVICE_ATTR, &attribute), "KVM_GET_DEVICE_ATTR");
    offset += saved.tsc - read_tsc(vcpu);
    need(ioctl(vcpu, KVM_HAS_DEVICE_ATTR, &attribute), "KVM_HAS_DEVICE_ATTR");
    need(ioctl(vcpu, KVM_SET_DEVICE_ATTR, &attribute), "KVM_SET_DEVICE_ATTR");
}

static void set_state(const struct vm *vm)
{
    need(ioctl(vm->vcpu, KVM_SET_SREGS2, &saved.sregs), "KVM_SET_SREGS2");
    need(ioctl(vm->vcpu, KVM_SET_XCRS, &saved.xcrs), "KVM_SET_XCRS");
    need(ioctl(vm->fd, KVM_CHECK_EXTENSION, KVM_CAP_XSAVE2), "KVM_CHECK_EXTENSION");
    need(ioctl(vm->vcpu, KVM_SET_XSAVE, &saved.xsave), "KVM_SET_XSAVE");
    need(ioctl(vm->vcpu, KVM_GET_TSC_KHZ, 0), "KVM_GET_TSC_KHZ");
    if (ioctl(vm->vcpu, KVM_SET_MSRS, &msrs) != (int)msrs.head.nmsrs)
        fatal("KVM_SET_MSRS");
    set_tsc(vm->vcpu);
    need(ioctl(vm->vcpu, KVM_SET_LAPIC, &saved.lapic), "KVM_SET_LAPIC");
    for (uint32_t id = 0; id < KVM_NR_IRQCHIPS; id++)
        need(ioctl(vm->fd, KVM_SET_IRQCHIP, &saved.irqchips[id]), "KVM_SET_IRQCHIP");
    need(ioctl(vm->vcpu, KVM_SET_REGS, &saved.regs), "KVM_SET_REGS");
    need(ioctl(kvm, KVM_CHECK_EXTENSION, KVM_CAP_EXCEPTION_PAYLOAD), "KVM_CHECK_EXTENSION");
    need(ioctl(vm->vcpu, KVM_SET_VCPU_EVENTS, &saved.events), "KVM_SET_VCPU_EVENTS");
    need(ioctl(vm->vcpu, KVM_SET_DEBUGREGS, &saved.debugregs), "KVM_SET_DEBUGREGS");
    need(ioctl(vm->vcpu, KVM_SET_MP_STATE, &saved.mp_state), "KVM_SET_MP_STATE");
    need(ioctl(vm->fd, KVM_SET_CLOCK, &saved.clock), "KVM_SET_CLOCK");
    (void)ioctl(vm->vcpu, KVM_KVMCLOCK_CTRL, 0); /* EINVAL: this guest uses no kvmclock */
}

/* Runs to the first exit, which must be the guest's byte, and looks where the vCPU stands. */
static void run(const struct vm *vm)
{
    struct kvm_regs regs;
    struct kvm_sregs2 sregs;
    need(ioctl(vm->vcpu, KVM_RUN, 0), "KVM_RUN");
    need(ioctl(vm->vcpu, KVM_GET_REGS, &regs), "KVM_GET_REGS");
    need(ioctl(vm->vcpu, KVM_GET_SREGS2, &sregs), "KVM_GET_SREGS2");
    struct kvm_translation page = {.linear_address = sregs.cs.base + regs.rip};
    need(ioctl(vm->vcpu, KVM_TRANSLATE, &page), "KVM_TRANSLATE");
    const struct kvm_run *at = vm->run;
    if (at->exit_reason != KVM_EXIT_IO || at->io.port != DEBUG_EXIT_PORT ||
        *((const uint8_t *)at + at->io.data_offset) != expected_status) {
        fprintf(stderr, "peer_restore: the guest did not get what it should read: exit reason %u\n", at->exit_reason);
        exit(1);
    }
}

static double sample(const char *request)
{
    static uint8_t head[1 << 20];
    (void)request;

    double start = now_ns();
    int fd = need(open(path, O_RDONLY | O_CLOEXEC), path);
    if (pread(fd, head, memory_offset, 0) != (ssize_t)memory_offset)
        fatal(path);
    uint8_t *ram = mmap(NULL, ram_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE, fd, (off_t)memory_offset);
    if (ram == MAP_FAILED)
        fatal("mmap");
    struct vm vm = create_vm(ram);
    set_state(&vm);
    run(&vm);
    double took = now_ns() - start;

    destroy_vm(&vm);
    munmap(ram, ram_size);
    close(fd);
    return took;
}

static void read_msr_numbers(const char *name)
{
    FILE *file = fopen(name, "r");
    if (!file)
        fatal(name);
    while (msrs.head.nmsrs < MOST_MSRS && fscanf(file, "%x", &msrs.entries[msrs.head.nmsrs].index) == 1)
        msrs.head.nmsrs++;
    fclose(file);
}

/* The state to set: what a VM has in front of its first instruction. */
static void make_state(uint64_t rip)
{
    uint8_t *ram = mmap(NULL, ram_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (ram == MAP_FAILED)
        fatal("mmap");
    struct vm vm = create_vm(ram);
    write_start_state(ram);
    set_registers(vm.vcpu, rip, ram_size);
    get_state(&vm);
    destroy_vm(&vm);
    munmap(ram, ram_size);
}

int main(int argc, char **argv)
{
    if (argc != 8)
        fatal("peer_restore");
    path = argv[1];
    memory_offset = strtoull(argv[2], NULL, 0);
    ram_size = strtoull(argv[3], NULL, 0);
    expected_status = (uint8_t)strtoul(argv[5], NULL, 0);
    read_cpuid(argv[6], &cpuid);
    read_msr_numbers(argv[7]);
    if (memory_offset > 1 << 20)
        fatal("MEMORY_OFFSET");
    kvm = need(open("/dev/kvm", O_RDWR | O_CLOEXEC), "/dev/kvm");
    make_state(strtoull(argv[4], NULL, 0));
    return serve(sample);
}
