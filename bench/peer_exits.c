/* SPDX-License-Identifier: MIT
 *
 * The peer of the row `exits`: a KVM_RUN loop that does nothing but give the default answer to a port access.
 *
 * usage: peer_exits IMAGE RAM_BYTES    IMAGE: a flat binary, which ends by a write to the debug-exit port
 */
#include "peer.h"

static uint8_t code[4096];
static size_t code_size, ram_size;
static int kvm;

/* The access at the end is the guest's last; IN gets all-ones, as from a bus without a listener. */
static void run(int vcpu, struct kvm_run *run)
{
    for (;;) {
        need(ioctl(vcpu, KVM_RUN, 0), "KVM_RUN");
        if (run->exit_reason != KVM_EXIT_IO) {
            fprintf(stderr, "peer_exits: exit reason %u\n", run->exit_reason);
            exit(1);
        }
        if (run->io.direction == KVM_EXIT_IO_IN)
            memset((uint8_t *)run + run->io.data_offset, 0xff, (size_t)run->io.size * run->io.count);
        else if (run->io.port == DEBUG_EXIT_PORT)
            return;
    }
}

/* A fresh VM for each sample, so that where its memory happens to lie is part of the spread. Only the run counts. */
static double sample(const char *request)
{
    (void)request;
    int vm = need(ioctl(kvm, KVM_CREATE_VM, 0), "KVM_CREATE_VM");
    need(ioctl(vm, KVM_SET_TSS_ADDR, 0xfffbd000), "KVM_SET_TSS_ADDR");
    int memory = need(memfd_create("ram", MFD_CLOEXEC), "memfd_create");
    need(ftruncate(memory, (off_t)ram_size), "ftruncate");
    uint8_t *ram = mmap(NULL, ram_size, PROT_READ | PROT_WRITE, MAP_SHARED, memory, 0);
    if (ram == MAP_FAILED)
        fatal("mmap");
    struct kvm_userspace_memory_region region = {.memory_size = ram_size, .userspace_addr = (uintptr_t)ram};
    need(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region), "KVM_SET_USER_MEMORY_REGION");
    int vcpu = need(ioctl(vm, KVM_CREATE_VCPU, 0), "KVM_CREATE_VCPU");
    size_t run_size = (size_t)need(ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), "KVM_GET_VCPU_MMAP_SIZE");
    struct kvm_run *shared = mmap(NULL, run_size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
    if (shared == MAP_FAILED)
        fatal("mmap of struct kvm_run");
    write_start_state(ram);
    memcpy(ram + LOAD_BASE, code, code_size);
    set_registers(vcpu, LOAD_BASE, ram_size);

    double start = now_ns();
    run(vcpu, shared);
    double took = now_ns() - start;

    munmap(shared, run_size);
    close(vcpu);
    close(vm);
    munmap(ram, ram_size);
    close(memory);
    return took;
}

int main(int argc, char **argv)
{
    FILE *file = argc == 3 ? fopen(argv[1], "rb") : NULL;
    if (!file)
        fatal("peer_exits");
    code_size = fread(code, 1, sizeof code, file);
    fclose(file);
    ram_size = strtoull(argv[2], NULL, 0);
    kvm = need(open("/dev/kvm", O_RDWR | O_CLOEXEC), "/dev/kvm");
    return serve(sample);
}
