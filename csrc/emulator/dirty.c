/* SPDX-License-Identifier: MIT
 *
 * Which pages of guest memory were written, while somebody wants to know. The library writes memory as this process
 * does, so the kernel is asked, in one of two ways:
 *
 *  - userfaultfd write-protects the pages and lets each go at its first write by itself (UFFD_FEATURE_WP_ASYNC), and
 *    PAGEMAP_SCAN tells of those and protects them again, in one step (Linux 6.7; Documentation/admin-guide/mm/
 *    userfaultfd.rst and pagemap.rst). Nobody is interrupted.
 *  - else mprotect() makes the pages read-only, and a handler of SIGSEGV notes each and makes it writable. The kernel
 *    itself cannot write such a page on our behalf then (EFAULT): pyhv_memory_write() is not for a VM that is being
 *    logged in this way.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "emulator/emulator.h"
#include "fault.h"

/* Of <linux/userfaultfd.h> and <linux/fs.h>, which may be older than the kernel. */
#define FEATURE_WP_SHMEM       (UINT64_C(1) << 12)
#define FEATURE_WP_UNPOPULATED (UINT64_C(1) << 13)
#define FEATURE_WP_ASYNC       (UINT64_C(1) << 15)
#define USER_MODE_ONLY         1

#define PAGE_IS_WRITTEN  (UINT64_C(1) << 1)
#define SCAN_PROTECT     (UINT64_C(1) << 0) /* PM_SCAN_WP_MATCHING */
#define SCAN_CHECK_ASYNC (UINT64_C(1) << 1)

struct scan_region {
    uint64_t start, end, categories;
};

struct scan {
    uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
    uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
};
#define SCAN_IOCTL _IOWR('f', 16, struct scan)

static uint64_t slot_pages(const struct pyhv_slot *slot)
{
    return slot->size / PYHV_PAGE_SIZE;
}

static uint64_t all_pages(const struct pyhv_emulator_vm *vm)
{
    uint64_t pages = 0;
    for (uint32_t i = 0; i < vm->base.slot_count; i++)
        pages += slot_pages(&vm->base.slots[i]);
    return pages;
}

static void set_bits(uint64_t *bitmap, uint64_t first, uint64_t end)
{
    for (uint64_t page = first; page < end; page++)
        bitmap[page / 64] |= UINT64_C(1) << page % 64;
}

/* ------------------------------------------------------------------------------------------------- by scan -- */

/* Protects every page that was written, and puts it into `bitmap` (NULL: nowhere). */
static int scan_slots(struct pyhv_emulator_vm *vm, uint64_t *bitmap, struct pyhv_error *error)
{
    struct scan_region regions[256];
    uint64_t first_page = 0;
    for (uint32_t i = 0; i < vm->base.slot_count; i++) {
        uint64_t begin = (uintptr_t)vm->base.slots[i].host, end = begin + vm->base.slots[i].size;
        struct scan scan = {
            .size = sizeof scan,
            .flags = SCAN_PROTECT | SCAN_CHECK_ASYNC,
            .start = begin,
            .end = end,
            .category_mask = PAGE_IS_WRITTEN,
            .return_mask = PAGE_IS_WRITTEN,
        };
        if (bitmap) {
            scan.vec = (uintptr_t)regions;
            scan.vec_len = sizeof regions / sizeof *regions;
        }
        do {
            int found = ioctl(vm->dirty.pagemap, SCAN_IOCTL, &scan);
            if (found < 0 && errno == EINTR)
                found = 0;
            else if (found < 0)
                return pyhv_fail_errno(error, "PAGEMAP_SCAN");
            for (int n = 0; bitmap && n < found; n++)
                set_bits(bitmap, first_page + (regions[n].start - begin) / PYHV_PAGE_SIZE,
                         first_page + (regions[n].end - begin) / PYHV_PAGE_SIZE);
            scan.start = scan.walk_end;
        } while (scan.start < end);
        first_page += slot_pages(&vm->base.slots[i]);
    }
    return 0;
}

static void end_scan(struct pyhv_emulator_vm *vm)
{
    /* Closing the descriptor takes the protection away. */
    if (vm->dirty.userfault >= 0)
        close(vm->dirty.userfault);
    if (vm->dirty.pagemap >= 0)
        close(vm->dirty.pagemap);
    vm->dirty.userfault = vm->dirty.pagemap = -1;
}

static int begin_scan(struct pyhv_emulator_vm *vm, struct pyhv_error *error)
{
    struct uffdio_api api = {
        .api = UFFD_API,
        .features = UFFD_FEATURE_PAGEFAULT_FLAG_WP | FEATURE_WP_SHMEM | FEATURE_WP_UNPOPULATED | FEATURE_WP_ASYNC,
    };
    vm->dirty.pagemap = -1;
    vm->dirty.userfault = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | USER_MODE_ONLY);
    const char *what = "userfaultfd";
    if (vm->dirty.userfault < 0)
        goto fail;
    what = "UFFDIO_API";
    if (ioctl(vm->dirty.userfault, UFFDIO_API, &api) < 0)
        goto fail;
    what = "UFFDIO_REGISTER";
    for (uint32_t i = 0; i < vm->base.slot_count; i++) {
        struct uffdio_register range = {
            .range = {.start = (uintptr_t)vm->base.slots[i].host, .len = vm->base.slots[i].size},
            .mode = UFFDIO_REGISTER_MODE_WP,
        };
        if (ioctl(vm->dirty.userfault, UFFDIO_REGISTER, &range) < 0)
            goto fail;
    }
    what = "/proc/self/pagemap";
    vm->dirty.pagemap = open(what, O_RDONLY | O_CLOEXEC);
    if (vm->dirty.pagemap < 0)
        goto fail;
    if (scan_slots(vm, NULL, error) == 0)
        return 0;
    end_scan(vm);
    return -1;

fail:
    pyhv_fail_errno(error, what);
    end_scan(vm);
    return -1;
}

/* ------------------------------------------------------------------------------------------------ by fault -- */

/* The VMs whose memory was ever made read-only, for the handler: it runs on any thread, at any moment, also when a write
 * that came before the end of logging gets to it after that. `handling`: how many threads are in it. */
enum { MAX_WATCHED = 64 };
static _Atomic(struct pyhv_emulator_vm *) watched[MAX_WATCHED];
static atomic_int handling;

static bool note_fault(const uint8_t *address)
{
    for (int i = 0; i < MAX_WATCHED; i++) {
        struct pyhv_emulator_vm *vm = atomic_load(&watched[i]);
        uint64_t first_page = 0;
        for (uint32_t n = 0; vm && n < vm->base.slot_count; n++) {
            const struct pyhv_slot *slot = &vm->base.slots[n];
            if (address >= slot->host && address < slot->host + slot->size) {
                uint64_t page = (uint64_t)(address - slot->host) / PYHV_PAGE_SIZE;
                uint64_t bit = first_page + page;
                /* The bit last: were it there before, take_faults() could take it away and protect the page in between,
                 * and the page would end up writable with nobody knowing. The write itself comes after both. */
                if (mprotect(slot->host + page * PYHV_PAGE_SIZE, PYHV_PAGE_SIZE, PROT_READ | PROT_WRITE) < 0)
                    return false;
                __atomic_fetch_or(&vm->dirty.written[bit / 64], UINT64_C(1) << bit % 64, __ATOMIC_SEQ_CST);
                return true;
            }
            first_page += slot_pages(slot);
        }
    }
    return false;
}

static bool let_write(const siginfo_t *info)
{
    int errnum = errno;
    atomic_fetch_add(&handling, 1);
    bool ours = info->si_code == SEGV_ACCERR && note_fault(info->si_addr);
    atomic_fetch_sub(&handling, 1);
    errno = errnum;
    return ours;
}

PYHV_FAULT(write_fault, SIGSEGV, let_write);

static int protect(const struct pyhv_emulator_vm *vm, int rights, struct pyhv_error *error)
{
    for (uint32_t i = 0; i < vm->base.slot_count; i++)
        if (mprotect(vm->base.slots[i].host, vm->base.slots[i].size, rights) < 0)
            return pyhv_fail_errno(error, "mprotect");
    return 0;
}

static void unwatch(struct pyhv_emulator_vm *vm)
{
    for (int i = 0; i < MAX_WATCHED; i++) {
        struct pyhv_emulator_vm *own = vm;
        atomic_compare_exchange_strong(&watched[i], &own, NULL);
    }
    while (atomic_load(&handling)) /* a fault of another VM's, whose handler may be looking at this one */
        sched_yield();
    free(vm->dirty.written);
    vm->dirty.written = NULL;
}

static int watch(struct pyhv_emulator_vm *vm, struct pyhv_error *error)
{
    vm->dirty.written = calloc((size_t)(all_pages(vm) + 63) / 64, sizeof *vm->dirty.written);
    if (!vm->dirty.written)
        return pyhv_fail(error, ENOMEM, "pyhv_vm_log_dirty", NULL);
    for (int i = 0; i < MAX_WATCHED; i++) {
        struct pyhv_emulator_vm *none = NULL;
        if (atomic_compare_exchange_strong(&watched[i], &none, vm))
            return 0;
    }
    unwatch(vm);
    return pyhv_fail(error, ENOSPC, "pyhv_vm_log_dirty", "%d VMs are being logged", MAX_WATCHED);
}

static void end_faults(struct pyhv_emulator_vm *vm)
{
    (void)protect(vm, PROT_READ | PROT_WRITE, NULL);
}

static int begin_faults(struct pyhv_emulator_vm *vm, struct pyhv_error *error)
{
    if (!vm->dirty.written && watch(vm, error) < 0)
        return -1;
    pyhv_fault_install(&write_fault);
    memset(vm->dirty.written, 0, (size_t)(all_pages(vm) + 63) / 64 * sizeof *vm->dirty.written);
    if (protect(vm, PROT_READ, error) == 0)
        return 0;
    end_faults(vm);
    return -1;
}

static int take_faults(struct pyhv_emulator_vm *vm, uint64_t *bitmap, struct pyhv_error *error)
{
    uint64_t first_page = 0;
    for (uint32_t i = 0; i < vm->base.slot_count; i++) {
        const struct pyhv_slot *slot = &vm->base.slots[i];
        uint64_t pages = slot_pages(slot);
        for (uint64_t page = 0; page < pages;) {
            uint64_t bit = first_page + page;
            if (!(__atomic_load_n(&vm->dirty.written[bit / 64], __ATOMIC_SEQ_CST) >> bit % 64 & 1)) {
                page++;
                continue;
            }
            /* Protected first: a write before that is in what is read after this, a write after it is noted again. */
            __atomic_fetch_and(&vm->dirty.written[bit / 64], ~(UINT64_C(1) << bit % 64), __ATOMIC_SEQ_CST);
            if (mprotect(slot->host + page * PYHV_PAGE_SIZE, PYHV_PAGE_SIZE, PROT_READ) < 0)
                return pyhv_fail_errno(error, "mprotect");
            set_bits(bitmap, bit, bit + 1);
            page++;
        }
        first_page += pages;
    }
    return 0;
}

/* ------------------------------------------------------------------------------------------------ together -- */

static void stop_logging(struct pyhv_emulator_vm *vm)
{
    if (vm->dirty.how == DIRTY_BY_SCAN)
        end_scan(vm);
    if (vm->dirty.how == DIRTY_BY_FAULT)
        end_faults(vm);
    vm->dirty.how = DIRTY_OFF;
}

int emulator_log_dirty(struct pyhv_vm *base, bool on, struct pyhv_error *error)
{
    struct pyhv_emulator_vm *vm = emulator_vm_of(base);
    if (!on) {
        stop_logging(vm);
        return 0;
    }
    if (vm->dirty.how != DIRTY_OFF)
        return 0;
    /* PYHV_DIRTY=fault: the way of older kernels, for tests. */
    const char *wish = getenv("PYHV_DIRTY");
    if (!(wish && strcmp(wish, "fault") == 0) && begin_scan(vm, NULL) == 0) {
        vm->dirty.how = DIRTY_BY_SCAN;
        return 0;
    }
    if (begin_faults(vm, error) < 0)
        return -1;
    vm->dirty.how = DIRTY_BY_FAULT;
    return 0;
}

int emulator_take_dirty(struct pyhv_vm *base, uint64_t *bitmap, struct pyhv_error *error)
{
    struct pyhv_emulator_vm *vm = emulator_vm_of(base);
    switch (vm->dirty.how) {
    case DIRTY_BY_SCAN:
        return scan_slots(vm, bitmap, error);
    case DIRTY_BY_FAULT:
        return take_faults(vm, bitmap, error);
    default:
        return pyhv_fail(error, EINVAL, "pyhv_vm_take_dirty", "writes to memory are not being logged");
    }
}

void emulator_dirty_close(struct pyhv_emulator_vm *vm)
{
    stop_logging(vm);
    if (vm->dirty.written)
        unwatch(vm);
}
