/* SPDX-License-Identifier: MIT
 *
 * Memory as the processor itself touches it: descriptor tables, the task-state segment, the stack of a handler.
 *
 * Source: SDM Vol. 3, chapter "Paging". The library walks page tables for the guest's instructions; it has no way to be
 * asked for one walk without side effects, and here a fault must become an exception of the right kind.
 */
#include <string.h>

#include "emulator/emulator.h"

#define CR0_WP         (UINT64_C(1) << 16)
#define CR0_PG         (UINT64_C(1) << 31)
#define CR4_PSE        (UINT64_C(1) << 4)
#define CR4_PAE        (UINT64_C(1) << 5)
#define CR4_SMAP       (UINT64_C(1) << 21)
#define EFER_LMA       (UINT64_C(1) << 10)
#define RFLAGS_AC      (UINT64_C(1) << 18)
#define ENTRY_PRESENT  UINT64_C(1)
#define ENTRY_WRITABLE UINT64_C(2)
#define ENTRY_USER     UINT64_C(4)
#define ENTRY_ACCESSED UINT64_C(0x20)
#define ENTRY_DIRTY    UINT64_C(0x40)
#define ENTRY_LARGE    UINT64_C(0x80)
#define ENTRY_ADDRESS  UINT64_C(0x000ffffffffff000)
#define ERROR_PRESENT  1u
#define ERROR_WRITE    2u
#define ERROR_USER     4u
#define PAGE_FAULT     14u
#define PROTECTION     13u

uint8_t *emulator_host(const struct pyhv_emulator_vm *vm, uint64_t gpa, uint64_t size)
{
    for (uint32_t i = 0; i < vm->base.slot_count; i++) {
        const struct pyhv_slot *slot = &vm->base.slots[i];
        if (gpa >= slot->gpa && gpa - slot->gpa < slot->size && size <= slot->size - (gpa - slot->gpa))
            return slot->host + (gpa - slot->gpa);
    }
    return NULL;
}

/* How a mode's tables are built: the number of levels and the bits of an address that each takes. */
struct walk {
    int levels;
    unsigned bits;
    unsigned entry_size;
    bool large_at_two, large_at_three; /* whether entries of that level may map a large page */
};

static struct walk walk_of(const struct cpu_state *state)
{
    if (state->efer & EFER_LMA)
        return (struct walk){.levels = 4, .bits = 9, .entry_size = 8, .large_at_two = true, .large_at_three = true};
    if (state->cr[4] & CR4_PAE)
        return (struct walk){.levels = 3, .bits = 9, .entry_size = 8, .large_at_two = true};
    return (struct walk){.levels = 2, .bits = 10, .entry_size = 4, .large_at_two = (state->cr[4] & CR4_PSE) != 0};
}

static int page_fault(struct emulator_fault *fault, uint64_t linear, unsigned access, bool present)
{
    *fault = (struct emulator_fault){
        .vector = PAGE_FAULT,
        .error_code = (present ? ERROR_PRESENT : 0) | (access & ACCESS_WRITE ? ERROR_WRITE : 0) |
                      (access & ACCESS_USER ? ERROR_USER : 0),
        .address = linear,
    };
    return -1;
}

/* Linear to physical, with the permissions and the accessed and dirty bits of a real access. */
static int translate(struct pyhv_emulator_vcpu *vcpu, const struct cpu_state *state, uint64_t linear, unsigned access,
                     uint64_t *gpa, struct emulator_fault *fault)
{
    if (!(state->cr[0] & CR0_PG)) {
        *gpa = linear & UINT32_MAX;
        return 0;
    }
    const struct walk walk = walk_of(state);
    if (walk.levels == 4 && (uint64_t)((int64_t)(linear << 16) >> 16) != linear) {
        *fault = (struct emulator_fault){.vector = PROTECTION};
        return -1;
    }
    if (walk.levels < 4)
        linear &= UINT32_MAX;
    uint64_t table = state->cr[3] & (walk.levels == 3 ? UINT64_C(0xffffffe0) : ENTRY_ADDRESS);
    uint64_t rights = ENTRY_WRITABLE | ENTRY_USER;
    uint8_t *places[4];
    for (int level = walk.levels;; level--) {
        unsigned shift = 12 + walk.bits * (unsigned)(level - 1);
        uint64_t index = linear >> shift & ((1u << walk.bits) - 1);
        uint8_t *place = emulator_host(emulator_vm(vcpu), table + index * walk.entry_size, walk.entry_size);
        uint64_t entry = 0;
        if (place)
            memcpy(&entry, place, walk.entry_size);
        if (!(entry & ENTRY_PRESENT))
            return page_fault(fault, linear, access, false);
        bool is_pdpte = walk.levels == 3 && level == 3; /* has neither rights nor an accessed bit */
        if (!is_pdpte)
            rights &= entry;
        places[level - 1] = is_pdpte ? NULL : place;
        bool large =
            (entry & ENTRY_LARGE) && ((level == 2 && walk.large_at_two) || (level == 3 && walk.large_at_three));
        if (level > 1 && !large) {
            table = entry & ENTRY_ADDRESS;
            continue;
        }

        bool checked = (access & ACCESS_USER) || (state->cr[0] & CR0_WP);
        bool barred = !(access & (ACCESS_USER | ACCESS_PEEK)) && (rights & ENTRY_USER) && (state->cr[4] & CR4_SMAP) &&
                      !((access & ACCESS_STACK) && (state->rflags & RFLAGS_AC));
        if (barred || ((access & ACCESS_USER) && !(rights & ENTRY_USER)) ||
            ((access & ACCESS_WRITE) && checked && !(rights & ENTRY_WRITABLE)))
            return page_fault(fault, linear, access, true);
        uint64_t offset = (UINT64_C(1) << shift) - 1;
        uint64_t page = entry & ENTRY_ADDRESS;
        if (large && walk.levels == 2) /* PSE-36: bits 39:32 stand at 20:13 */
            page = (entry & 0xffc00000) | (entry >> 13 & 0xff) << 32;
        *gpa = (page & ~offset) | (linear & offset);
        if (access & ACCESS_PEEK)
            return 0;
        for (int i = walk.levels - 1; i >= level - 1; i--) {
            if (!places[i])
                continue;
            uint8_t bits = ENTRY_ACCESSED | (i == level - 1 && (access & ACCESS_WRITE) ? ENTRY_DIRTY : 0);
            if ((*places[i] & bits) != bits)
                *places[i] |= bits;
        }
        return 0;
    }
}

int emulator_copy(struct pyhv_emulator_vcpu *vcpu, const struct cpu_state *state, uint64_t linear, void *buffer,
                  size_t size, unsigned access, struct emulator_fault *fault)
{
    uint8_t *bytes = buffer;
    while (size > 0) {
        size_t room = PYHV_PAGE_SIZE - (linear & (PYHV_PAGE_SIZE - 1));
        size_t part = size < room ? size : room;
        uint64_t gpa;
        if (translate(vcpu, state, linear, access, &gpa, fault) < 0)
            return -1;
        uint8_t *host = emulator_host(emulator_vm(vcpu), gpa, part);
        if (!(access & ACCESS_WRITE)) {
            if (host)
                memcpy(bytes, host, part);
            else
                memset(bytes, 0xff, part);
        } else if (host) { /* by the library, which forgets what it has translated of that place */
            uc.mem_write(vcpu->engine, gpa, bytes, part);
        }
        linear += part;
        bytes += part;
        size -= part;
    }
    return 0;
}

size_t emulator_peek(struct pyhv_emulator_vcpu *vcpu, const struct cpu_state *state, uint64_t linear, void *buffer,
                     size_t size)
{
    size_t done = 0;
    while (done < size) {
        struct emulator_fault fault;
        uint64_t gpa;
        size_t room = PYHV_PAGE_SIZE - ((linear + done) & (PYHV_PAGE_SIZE - 1));
        size_t part = size - done < room ? size - done : room;
        if (translate(vcpu, state, linear + done, ACCESS_PEEK, &gpa, &fault) < 0)
            break;
        const uint8_t *host = emulator_host(emulator_vm(vcpu), gpa, part);
        /* A file behind the memory may have been cut short: then this is an error, and no signal. */
        if (!host || pyhv_memory_read(host, (uint8_t *)buffer + done, part, NULL) < 0)
            break;
        done += part;
    }
    return done;
}
