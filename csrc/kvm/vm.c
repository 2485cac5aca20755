/* SPDX-License-Identifier: MIT
 *
 * The KVM system descriptor, VMs and their memory.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "kvm/kvm.h"

/* Three pages for the task-state segment of virtual real mode, one page below them for its identity map.
 * Hosts without unrestricted guest (Intel before Westmere) run real-mode code with their help. Firmware has
 * this place: right below the 256 KiB under 4 GiB; guest RAM ends at 3 GiB and goes on at 4 GiB. */
#define TSS_ADDRESS          0xfffbd000u
#define IDENTITY_MAP_ADDRESS 0xfffbc000u

int pyhv_kvm_open(const char *path, struct pyhv_error *error)
{
    int fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0)
        return pyhv_fail_errno(error, path);
    int version = ioctl(fd, KVM_GET_API_VERSION, 0);
    if (version != KVM_API_VERSION) {
        int errnum = version < 0 ? errno : 0;
        close(fd);
        return pyhv_fail(error, errnum, "KVM_GET_API_VERSION", "found %d, need %d", version, KVM_API_VERSION);
    }
    return fd;
}

int pyhv_kvm_check_extension(int fd, uint32_t capability, struct pyhv_error *error)
{
    int value = ioctl(fd, KVM_CHECK_EXTENSION, capability);
    return value < 0 ? pyhv_fail_errno(error, "KVM_CHECK_EXTENSION") : value;
}

int pyhv_kvm_msr_list(int kvm_fd, int features, uint32_t *indices, size_t capacity, struct pyhv_error *error)
{
    /* More than any kernel lists (about 250 in 6.18); a longer list is reported, not cut. */
    enum { MOST = 2048 };
    struct {
        struct kvm_msr_list head;
        uint32_t indices[MOST];
    } list = {.head.nmsrs = MOST};
    const char *what = features ? "KVM_GET_MSR_FEATURE_INDEX_LIST" : "KVM_GET_MSR_INDEX_LIST";
    if (ioctl(kvm_fd, features ? KVM_GET_MSR_FEATURE_INDEX_LIST : KVM_GET_MSR_INDEX_LIST, &list) < 0)
        return pyhv_fail_errno(error, what);
    if (list.head.nmsrs > capacity)
        return pyhv_fail(error, E2BIG, what, "%u MSRs", list.head.nmsrs);
    memcpy(indices, list.indices, list.head.nmsrs * sizeof *indices);
    return (int)list.head.nmsrs;
}

int pyhv_kvm_feature_msr(int kvm_fd, uint32_t index, uint64_t *value, struct pyhv_error *error)
{
    struct {
        struct kvm_msrs head;
        struct kvm_msr_entry entry;
    } msrs = {.head.nmsrs = 1, .entry.index = index};
    int taken = ioctl(kvm_fd, KVM_GET_MSRS, &msrs);
    if (taken != 1)
        return pyhv_fail(error, taken < 0 ? errno : 0, "KVM_GET_MSRS", "feature MSR 0x%x", index);
    *value = msrs.entry.data;
    return 0;
}

static const struct pyhv_vm_ops operations;

static void raise_irq(void *opaque, uint32_t gsi, int32_t level)
{
    struct pyhv_kvm_vm *vm = opaque;
    struct kvm_irq_level line = {.irq = gsi, .level = (uint32_t)level};
    /* Fails only for a line that the irqchip does not have; devices are built with ISA lines, 0 to 15. */
    (void)ioctl(vm->fd, KVM_IRQ_LINE, &line);
}

static int create_pit(struct pyhv_kvm_vm *vm, struct pyhv_error *error)
{
    /* The kernel takes port 0x61 too: guests calibrate the TSC with the PIT's second channel there. */
    struct kvm_pit_config pit = {.flags = KVM_PIT_SPEAKER_DUMMY};
    return ioctl(vm->fd, KVM_CREATE_PIT2, &pit) < 0 ? pyhv_fail_errno(error, "KVM_CREATE_PIT2") : 0;
}

/* Creates the irqchip, if one is wanted: before the first vCPU, which gets its LAPIC from it. */
static int complete(struct pyhv_kvm_vm *vm, struct pyhv_error *error)
{
    if (!vm->base.irqchip || vm->complete)
        return 0;
    if (ioctl(vm->fd, KVM_CREATE_IRQCHIP, 0) < 0)
        return pyhv_fail_errno(error, "KVM_CREATE_IRQCHIP");
    if (vm->base.pit && create_pit(vm, error) < 0)
        return -1;
    vm->complete = true;
    return 0;
}

/* Lets the devices on `bus` raise their interrupts in the VM's irqchip, if it has one. */
static void set_bus(struct pyhv_kvm_vm *vm, struct pyhv_bus *bus)
{
    vm->base.bus = bus;
    if (vm->base.irqchip)
        pyhv_bus_set_irq_sink(bus, (struct pyhv_irq_sink){.raise = raise_irq, .opaque = vm});
}

struct pyhv_vm *pyhv_kvm_vm_create(int kvm_fd, const struct pyhv_vm_config *config, struct pyhv_bus *bus,
                                   struct pyhv_error *error)
{
    struct pyhv_kvm_vm *vm = calloc(1, sizeof *vm);
    if (!vm) {
        pyhv_fail(error, ENOMEM, "pyhv_kvm_vm_create", NULL);
        return NULL;
    }
    vm->base.ops = &operations;
    vm->kvm_fd = kvm_fd;
    vm->base.irqchip = config->irqchip != 0;
    vm->base.pit = vm->base.irqchip && config->pit;
    do { /* a signal may interrupt it while KVM waits for other VMs */
        vm->fd = ioctl(kvm_fd, KVM_CREATE_VM, 0);
    } while (vm->fd < 0 && errno == EINTR);
    if (vm->fd < 0) {
        pyhv_fail_errno(error, "KVM_CREATE_VM");
        free(vm);
        return NULL;
    }

    /* Both before the first vCPU (api.rst, KVM_SET_IDENTITY_MAP_ADDR: fails once a vCPU exists). */
    uint64_t identity_map = IDENTITY_MAP_ADDRESS;
    if (ioctl(vm->fd, KVM_SET_IDENTITY_MAP_ADDR, &identity_map) < 0) {
        pyhv_fail_errno(error, "KVM_SET_IDENTITY_MAP_ADDR");
        goto fail;
    }
    if (ioctl(vm->fd, KVM_SET_TSS_ADDR, TSS_ADDRESS) < 0) {
        pyhv_fail_errno(error, "KVM_SET_TSS_ADDR");
        goto fail;
    }
    /* A pending exception then keeps its payload (CR2, DR6) apart until delivery, so that it can be saved. */
    if (ioctl(kvm_fd, KVM_CHECK_EXTENSION, KVM_CAP_EXCEPTION_PAYLOAD) > 0) {
        struct kvm_enable_cap payload = {.cap = KVM_CAP_EXCEPTION_PAYLOAD, .args[0] = 1};
        if (ioctl(vm->fd, KVM_ENABLE_CAP, &payload) < 0) {
            pyhv_fail_errno(error, "KVM_ENABLE_CAP(KVM_CAP_EXCEPTION_PAYLOAD)");
            goto fail;
        }
    }
    /* A triple fault that is pending is then among a vCPU's events (Linux 6.0), so that it can be saved. */
    if (ioctl(kvm_fd, KVM_CHECK_EXTENSION, KVM_CAP_X86_TRIPLE_FAULT_EVENT) > 0) {
        struct kvm_enable_cap event = {.cap = KVM_CAP_X86_TRIPLE_FAULT_EVENT, .args[0] = 1};
        if (ioctl(vm->fd, KVM_ENABLE_CAP, &event) < 0) {
            pyhv_fail_errno(error, "KVM_ENABLE_CAP(KVM_CAP_X86_TRIPLE_FAULT_EVENT)");
            goto fail;
        }
        vm->triple_fault_event = true;
    }
    /* Guests are never shown a PMU. With one, KVM gives AMD guests four counters all the same, which would not travel. */
    if (ioctl(kvm_fd, KVM_CHECK_EXTENSION, KVM_CAP_PMU_CAPABILITY) > 0) {
        struct kvm_enable_cap pmu = {.cap = KVM_CAP_PMU_CAPABILITY, .args[0] = KVM_PMU_CAP_DISABLE};
        if (ioctl(vm->fd, KVM_ENABLE_CAP, &pmu) < 0) {
            pyhv_fail_errno(error, "KVM_ENABLE_CAP(KVM_CAP_PMU_CAPABILITY)");
            goto fail;
        }
    }
    if (!config->late && complete(vm, error) < 0)
        goto fail;
    if (bus)
        set_bus(vm, bus);
    return &vm->base;

fail:
    close(vm->fd);
    free(vm);
    return NULL;
}

int pyhv_kvm_vm_adopt(struct pyhv_vm *base, struct pyhv_bus *bus, int pit, struct pyhv_error *error)
{
    struct pyhv_kvm_vm *vm = kvm_vm_of(base);
    if (!vm->complete || base->pit || base->bus)
        return pyhv_fail(error, EINVAL, "pyhv_kvm_vm_adopt", "the VM has no irqchip yet, or a PIT or a bus already");
    set_bus(vm, bus);
    if (pit && create_pit(vm, error) < 0)
        return -1;
    base->pit = pit != 0;
    return 0;
}

static void destroy(struct pyhv_vm *base)
{
    struct pyhv_kvm_vm *vm = kvm_vm_of(base);
    close(vm->fd);
    free(vm->dirty);
    free(vm);
}

/* KVM_SET_USER_MEMORY_REGION for the slot of that number, as it is or is to be. */
static int set_region(struct pyhv_kvm_vm *vm, uint32_t number, const struct pyhv_slot *slot, bool log_dirty,
                      struct pyhv_error *error)
{
    struct kvm_userspace_memory_region region = {
        .slot = number,
        .flags = log_dirty ? KVM_MEM_LOG_DIRTY_PAGES : 0,
        .guest_phys_addr = slot->gpa,
        .memory_size = slot->size,
        .userspace_addr = (uint64_t)(uintptr_t)slot->host,
    };
    if (ioctl(vm->fd, KVM_SET_USER_MEMORY_REGION, &region) < 0)
        return pyhv_fail(error, errno, "KVM_SET_USER_MEMORY_REGION", "0x%llx bytes at gpa 0x%llx",
                         (unsigned long long)slot->size, (unsigned long long)slot->gpa);
    return 0;
}

static int map(struct pyhv_vm *base, const struct pyhv_slot *slot, struct pyhv_error *error)
{
    struct pyhv_kvm_vm *vm = kvm_vm_of(base);
    if (vm->logs_dirty)
        return pyhv_fail(error, EBUSY, "pyhv_vm_map", "writes to memory are being logged");
    return set_region(vm, base->slot_count, slot, false, error);
}

/* ------------------------------------------------------------------------------------------------ pauses -- */

/* The PIT's timer runs on in a pause, and KVM owes the guest each of its ticks, to make them good one by one: after two
 * seconds 2,000 of them, as quick as the guest takes them. Loading the count anew forgets the debt (kvm_pit_load_count() in
 * arch/x86/kvm/i8254.c; KVM_REINJECT_CONTROL would too, but waits for a grace period of RCU). A period begins then; one
 * tick may wait in the interrupt controller, which holds no more of a line. Of a single shot there is no debt: loaded anew
 * it would come twice. */
static int forget_ticks(struct pyhv_kvm_vm *vm, struct pyhv_error *error)
{
    enum { RATE_GENERATOR = 2, SQUARE_WAVE = 3 };
    struct kvm_pit_state2 pit;
    if (ioctl(vm->fd, KVM_GET_PIT2, &pit) < 0)
        return pyhv_fail_errno(error, "KVM_GET_PIT2");
    if (pit.channels[0].mode != RATE_GENERATOR && pit.channels[0].mode != SQUARE_WAVE)
        return 0;
    return ioctl(vm->fd, KVM_SET_PIT2, &pit) < 0 ? pyhv_fail_errno(error, "KVM_SET_PIT2") : 0;
}

static int resume(struct pyhv_vm *base, struct pyhv_error *error)
{
    struct pyhv_kvm_vm *vm = kvm_vm_of(base);
    for (struct pyhv_vcpu *vcpu = base->vcpus; vcpu; vcpu = vcpu->next)
        if (kvm_clock_paused(vcpu, error) < 0)
            return -1;
    return base->pit && vm->complete ? forget_ticks(vm, error) : 0;
}

/* ------------------------------------------------------------------------------------------- dirty pages -- */

/* The words of a slot's dirty bitmap. */
static size_t dirty_words(const struct pyhv_slot *slot)
{
    return (size_t)((slot->size / PYHV_PAGE_SIZE + 63) / 64);
}

/* Makes room for the largest slot's bitmap, and sees that each slot's bits begin with a word. */
static int prepare_dirty(struct pyhv_kvm_vm *vm, struct pyhv_error *error)
{
    size_t most = 0;
    for (uint32_t i = 0; i < vm->base.slot_count; i++) {
        const struct pyhv_slot *slot = &vm->base.slots[i];
        if (i + 1 < vm->base.slot_count && slot->size / PYHV_PAGE_SIZE % 64)
            return pyhv_fail(error, EINVAL, "pyhv_vm_log_dirty",
                             "0x%llx bytes at gpa 0x%llx are not a multiple of 64 pages",
                             (unsigned long long)slot->size, (unsigned long long)slot->gpa);
        most = dirty_words(slot) > most ? dirty_words(slot) : most;
    }
    free(vm->dirty);
    vm->dirty = calloc(most, sizeof *vm->dirty);
    return vm->dirty || !most ? 0 : pyhv_fail(error, ENOMEM, "pyhv_vm_log_dirty", NULL);
}

static int log_dirty(struct pyhv_vm *base, bool wanted, struct pyhv_error *error)
{
    struct pyhv_kvm_vm *vm = kvm_vm_of(base);
    if (wanted == vm->logs_dirty)
        return 0;
    if (wanted && prepare_dirty(vm, error) < 0)
        return -1;
    for (uint32_t i = 0; i < base->slot_count; i++)
        if (set_region(vm, i, &base->slots[i], wanted, error) < 0) {
            while (i > 0) { /* back to how it was */
                i--;
                (void)set_region(vm, i, &base->slots[i], !wanted, NULL);
            }
            return -1;
        }
    vm->logs_dirty = wanted;
    return 0;
}

static int take_dirty(struct pyhv_vm *base, uint64_t *bitmap, struct pyhv_error *error)
{
    struct pyhv_kvm_vm *vm = kvm_vm_of(base);
    if (!vm->logs_dirty)
        return pyhv_fail(error, EINVAL, "pyhv_vm_take_dirty", "writes to memory are not being logged");
    for (uint32_t i = 0; i < base->slot_count; i++) {
        struct kvm_dirty_log log = {.slot = i, .dirty_bitmap = vm->dirty};
        if (ioctl(vm->fd, KVM_GET_DIRTY_LOG, &log) < 0)
            return pyhv_fail(error, errno, "KVM_GET_DIRTY_LOG", "slot %u", i);
        for (size_t words = dirty_words(&base->slots[i]), word = 0; word < words; word++)
            *bitmap++ |= vm->dirty[word];
    }
    return 0;
}

static struct pyhv_vcpu *create_vcpu(struct pyhv_vm *vm, uint32_t index, struct pyhv_error *error)
{
    return complete(kvm_vm_of(vm), error) < 0 ? NULL : kvm_vcpu_create(vm, index, error);
}

static const struct pyhv_vm_ops operations = {
    .destroy = destroy,
    .map = map,
    .log_dirty = log_dirty,
    .take_dirty = take_dirty,
    .resume = resume,
    .save_state = kvm_save_state,
    .load_state = kvm_load_state,
    .create_vcpu = create_vcpu,
};
