/* SPDX-License-Identifier: MIT
 *
 * The peer of the row `machine`: a C program that makes the KVM calls that pyhv makes for Machine("hello"), run() and
 * close(), in the same order, and what is needed around them, straight on. It has no bus, no policy, no thread and no way
 * to be stopped; it does what it would take to write this one VM down by hand.
 *
 * usage: peer_hello IMAGE RAM_BYTES CPUID    IMAGE: an ELF64 executable; CPUID: see read_cpuid()
 */
#include <elf.h>

#include "peer.h"

enum { SERIAL_PORT = 0x3f8, IDENTITY_MAP_ADDRESS = 0xfffbc000, TSS_ADDRESS = 0xfffbd000 };

static struct cpuid cpuid;
static const char *image;
static size_t ram_size;
static int kvm;

/* Reads the image anew for every VM, as pyhv does. Returns its entry point. */
static uint64_t load(uint8_t *ram)
{
    static uint8_t file[1 << 20];
    int fd = need(open(image, O_RDONLY | O_CLOEXEC), image);
    ssize_t size = read(fd, file, sizeof file);
    close(fd);
    if (size < (ssize_t)sizeof(Elf64_Ehdr))
        fatal(image);
    const Elf64_Ehdr *header = (const Elf64_Ehdr *)file;
    const Elf64_Phdr *segments = (const Elf64_Phdr *)(file + header->e_phoff);
    for (int i = 0; i < header->e_phnum; i++)
        if (segments[i].p_type == PT_LOAD)
            memcpy(ram + segments[i].p_paddr, file + segments[i].p_offset, segments[i].p_filesz);
    write_start_state(ram);
    ram[COMMAND_LINE] = 0;
    return header->e_entry;
}

static int create_vm(uint8_t *ram)
{
    int vm = need(ioctl(kvm, KVM_CREATE_VM, 0), "KVM_CREATE_VM");
    uint64_t identity_map = IDENTITY_MAP_ADDRESS;
    need(ioctl(vm, KVM_SET_IDENTITY_MAP_ADDR, &identity_map), "KVM_SET_IDENTITY_MAP_ADDR");
    need(ioctl(vm, KVM_SET_TSS_ADDR, TSS_ADDRESS), "KVM_SET_TSS_ADDR");
    if (ioctl(kvm, KVM_CHECK_EXTENSION, KVM_CAP_EXCEPTION_PAYLOAD) > 0) {
        struct kvm_enable_cap payload = {.cap = KVM_CAP_EXCEPTION_PAYLOAD, .args[0] = 1};
        need(ioctl(vm, KVM_ENABLE_CAP, &payload), "KVM_ENABLE_CAP");
    }
    if (ioctl(kvm, KVM_CHECK_EXTENSION, KVM_CAP_X86_TRIPLE_FAULT_EVENT) > 0) {
        struct kvm_enable_cap event = {.cap = KVM_CAP_X86_TRIPLE_FAULT_EVENT, .args[0] = 1};
        need(ioctl(vm, KVM_ENABLE_CAP, &event), "KVM_ENABLE_CAP");
    }
    if (ioctl(kvm, KVM_CHECK_EXTENSION, KVM_CAP_PMU_CAPABILITY) > 0) {
        struct kvm_enable_cap pmu = {.cap = KVM_CAP_PMU_CAPABILITY, .args[0] = KVM_PMU_CAP_DISABLE};
        need(ioctl(vm, KVM_ENABLE_CAP, &pmu), "KVM_ENABLE_CAP");
    }
    need(ioctl(vm, KVM_CREATE_IRQCHIP, 0), "KVM_CREATE_IRQCHIP");
    struct kvm_userspace_memory_region region = {.memory_size = ram_size, .userspace_addr = (uintptr_t)ram};
    need(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region), "KVM_SET_USER_MEMORY_REGION");
    return vm;
}

static void run(int vcpu, struct kvm_run *run, int console)
{
    need(ioctl(vcpu, KVM_GET_TSC_KHZ, 0), "KVM_GET_TSC_KHZ");
    for (;;) {
        need(ioctl(vcpu, KVM_RUN, 0), "KVM_RUN");
        if (run->exit_reason != KVM_EXIT_IO || run->io.direction != KVM_EXIT_IO_OUT) {
            fprintf(stderr, "peer_hello: exit reason %u\n", run->exit_reason);
            exit(1);
        }
        const uint8_t *data = (const uint8_t *)run + run->io.data_offset;
        if (run->io.port == SERIAL_PORT && write(console, data, run->io.count) != (ssize_t)run->io.count)
            fatal("console");
        if (run->io.port == DEBUG_EXIT_PORT)
            break;
    }
    /* Where the vCPU stands, and the bytes there: part of every exit that pyhv reports. */
    struct kvm_regs regs;
    struct kvm_sregs2 sregs;
    need(ioctl(vcpu, KVM_GET_REGS, &regs), "KVM_GET_REGS");
    need(ioctl(vcpu, KVM_GET_SREGS2, &sregs), "KVM_GET_SREGS2");
    struct kvm_translation page = {.linear_address = sregs.cs.base + regs.rip};
    need(ioctl(vcpu, KVM_TRANSLATE, &page), "KVM_TRANSLATE");
}

static double sample(const char *request)
{
    static const char expected[] = "hello from a pyhv guest\n";
    char said[sizeof expected] = "";
    (void)request;

    double start = now_ns();
    int console = need(memfd_create("console", MFD_CLOEXEC), "memfd_create");
    int memory = need(memfd_create("ram", MFD_CLOEXEC), "memfd_create");
    need(ftruncate(memory, (off_t)ram_size), "ftruncate");
    uint8_t *ram = mmap(NULL, ram_size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, memory, 0);
    if (ram == MAP_FAILED)
        fatal("mmap");
    int vm = create_vm(ram);
    size_t run_size = (size_t)need(ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), "KVM_GET_VCPU_MMAP_SIZE");
    int vcpu = need(ioctl(vm, KVM_CREATE_VCPU, 0), "KVM_CREATE_VCPU");
    struct kvm_run *shared = mmap(NULL, run_size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
    if (shared == MAP_FAILED)
        fatal("mmap of struct kvm_run");
    struct kvm_enable_cap enforce = {.cap = KVM_CAP_ENFORCE_PV_FEATURE_CPUID, .args[0] = 1};
    need(ioctl(vcpu, KVM_ENABLE_CAP, &enforce), "KVM_ENABLE_CAP");
    need(ioctl(vcpu, KVM_SET_CPUID2, &cpuid), "KVM_SET_CPUID2");
    set_registers(vcpu, load(ram), ram_size);
    run(vcpu, shared, console);
    munmap(shared, run_size);
    close(vcpu);
    close(vm);
    munmap(ram, ram_size);
    close(memory);
    ssize_t length = pread(console, said, sizeof said, 0);
    close(console);
    double took = now_ns() - start;

    if (length != sizeof expected - 1 || memcmp(said, expected, (size_t)length) != 0) {
        fprintf(stderr, "peer_hello: the guest did not say hello\n");
        exit(1);
    }
    return took;
}

int main(int argc, char **argv)
{
    if (argc != 4)
        fatal("peer_hello");
    image = argv[1];
    ram_size = strtoull(argv[2], NULL, 0);
    read_cpuid(argv[3], &cpuid);
    kvm = need(open("/dev/kvm", O_RDWR | O_CLOEXEC), "/dev/kvm");
    return serve(sample);
}
