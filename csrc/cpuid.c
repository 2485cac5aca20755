/* SPDX-License-Identifier: MIT
 *
 * CPUID as a processor answers it. Pure: no KVM, no I/O, no allocation, no state but the table.
 *
 * Two authorities, in this order. Where KVM can answer the same question (arch/x86/kvm/cpuid.c: kvm_cpuid(),
 * get_out_of_range_cpuid_entry(), kvm_update_cpuid_runtime()) the answer here is the same, because `kernel` and `trap`
 * must be one to the guest; where KVM leaves room, the manuals decide: SDM Vol. 2A "CPUID" and Vol. 1 chapter 13
 * (XSAVE), APM Vol. 3 appendix E.
 */
#include "pyhv.h"

#include "error.h"
#include "gen/cpuid_bits.h"

#include <cpuid.h>
#include <errno.h>
#include <string.h>

/* The leaves whose answers have a structure that matters here. */
enum {
    LEAF_VENDOR = 0x0,
    LEAF_FEATURES = 0x1,
    LEAF_STRUCTURED_FEATURES = 0x7,
    LEAF_TOPOLOGY = 0xB,
    LEAF_XSTATE = 0xD,
    LEAF_TOPOLOGY_V2 = 0x1F,
};

/* The first leaf of each range (SDM Vol. 2A, "CPUID"; the hypervisor's is a convention, see KVM's
 * Documentation/virt/kvm/x86/cpuid.rst). */
#define RANGE_HYPERVISOR     UINT32_C(0x40000000)
#define RANGE_HYPERVISOR_END UINT32_C(0x4FFFFFFF)
#define RANGE_EXTENDED       UINT32_C(0x80000000)
#define RANGE_CENTAUR        UINT32_C(0xC0000000)

#define CR4_OSXSAVE      (UINT64_C(1) << 18) /* SDM Vol. 3A, 2.5 "Control Registers" */
#define CR4_PKE          (UINT64_C(1) << 22)
#define APIC_BASE_ENABLE (UINT64_C(1) << 11) /* SDM Vol. 3A, "Local APIC Status and Location" */

/* The XSAVE area begins with the 512 bytes of FXSAVE and a header of 64 (SDM Vol. 1, 13.4); components 0 and 1 live
 * in there, the others behind it. */
#define XSAVE_LEGACY_SIZE       UINT32_C(576)
#define XSAVE_LEGACY_COMPONENTS UINT64_C(3)
#define XSAVE_ALIGNED_TO_64     (UINT32_C(1) << 1) /* leaf 0xD subleaf n, ECX */

static uint64_t key_of(uint32_t leaf, uint32_t subleaf)
{
    return (uint64_t)leaf << 32 | subleaf;
}

static uint64_t entry_key(const struct pyhv_cpuid_entry *entry)
{
    return key_of(entry->leaf, entry->subleaf);
}

/* The last of the `left` entries from `entry` on whose key is not above (leaf, subleaf); the first one's is known not to
 * be. The comparison is a conditional move, not a branch: guests ask in an order that no predictor knows. */
static const struct pyhv_cpuid_entry *nearest_of(const struct pyhv_cpuid_entry *entry, uint32_t left, uint32_t leaf,
                                                 uint32_t subleaf)
{
    uint64_t key = key_of(leaf, subleaf);

    while (left > 1) {
        uint32_t half = left / 2;
        entry = entry_key(entry + half) <= key ? entry + half : entry;
        left -= half;
    }
    return entry;
}

/* The last entry whose key is not above (leaf, subleaf). Every table has leaf 0, so there is always an entry to stand
 * on. */
static const struct pyhv_cpuid_entry *nearest(const struct pyhv_cpuid_table *table, uint32_t leaf, uint32_t subleaf)
{
    uint32_t number = leaf & ~RANGE_EXTENDED;

    if (number >= PYHV_CPUID_PLACES)
        return nearest_of(table->entries, table->count, leaf, subleaf);
    const struct pyhv_cpuid_place *place = &table->places[leaf >= RANGE_EXTENDED][number];
    return nearest_of(table->entries + place->first, place->last - place->first + 1u, leaf, subleaf);
}

static void find_places(struct pyhv_cpuid_table *table)
{
    for (uint32_t range = 0; range < 2; range++) {
        for (uint32_t number = 0; number < PYHV_CPUID_PLACES; number++) {
            uint32_t leaf = range * RANGE_EXTENDED + number;
            const struct pyhv_cpuid_entry *first = nearest_of(table->entries, table->count, leaf, 0);
            const struct pyhv_cpuid_entry *last = nearest_of(table->entries, table->count, leaf, UINT32_MAX);
            table->places[range][number].first = (uint8_t)(first - table->entries);
            table->places[range][number].last = (uint8_t)(last - table->entries);
        }
    }
}

static int answers(const struct pyhv_cpuid_entry *entry, uint32_t leaf, uint32_t subleaf)
{
    return entry->leaf == leaf && (!entry->indexed || entry->subleaf == subleaf);
}

/* The entry that answers (leaf, subleaf), or NULL. */
static const struct pyhv_cpuid_entry *find(const struct pyhv_cpuid_table *table, uint32_t leaf, uint32_t subleaf)
{
    const struct pyhv_cpuid_entry *entry = nearest(table, leaf, subleaf);

    return answers(entry, leaf, subleaf) ? entry : NULL;
}

/* AMD and Hygon answer an undefined leaf with zeros (APM Vol. 3, appendix E); everyone else does as Intel does. */
static int vendor_answers_zeros(const struct pyhv_cpuid_entry *leaf0)
{
    char vendor[12];

    memcpy(vendor, &leaf0->ebx, 4);
    memcpy(vendor + 4, &leaf0->edx, 4);
    memcpy(vendor + 8, &leaf0->ecx, 4);
    return memcmp(vendor, "AuthenticAMD", 12) == 0 || memcmp(vendor, "HygonGenuine", 12) == 0;
}

int pyhv_cpuid_table_init(struct pyhv_cpuid_table *table, const struct pyhv_cpuid_entry *entries, size_t count,
                          struct pyhv_error *error)
{
    memset(table, 0, sizeof *table);
    if (count > PYHV_CPUID_MAX_ENTRIES)
        return pyhv_fail(error, E2BIG, "CPUID table", "%zu entries, at most %d are possible", count,
                         PYHV_CPUID_MAX_ENTRIES);

    /* Insertion: tables come sorted, or nearly so. */
    for (size_t i = 0; i < count; i++) {
        struct pyhv_cpuid_entry entry = entries[i];
        size_t at = i;

        entry.indexed = !!entry.indexed;
        if (!entry.indexed && entry.subleaf)
            return pyhv_fail(error, EINVAL, "CPUID table", "leaf 0x%x: subleaf 0x%x of a leaf that ignores ECX",
                             entry.leaf, entry.subleaf);
        while (at > 0 && entry_key(&table->entries[at - 1]) > entry_key(&entry)) {
            table->entries[at] = table->entries[at - 1];
            at--;
        }
        table->entries[at] = entry;
    }

    for (size_t i = 1; i < count; i++) {
        const struct pyhv_cpuid_entry *before = &table->entries[i - 1], *entry = before + 1;

        if (entry_key(before) == entry_key(entry))
            return pyhv_fail(error, EINVAL, "CPUID table", "two entries for leaf 0x%x subleaf 0x%x", entry->leaf,
                             entry->subleaf);
        if (before->leaf == entry->leaf && before->indexed != entry->indexed)
            return pyhv_fail(error, EINVAL, "CPUID table", "leaf 0x%x both ignores and obeys ECX", entry->leaf);
    }
    if (count == 0 || entry_key(&table->entries[0]) != key_of(LEAF_VENDOR, 0))
        return pyhv_fail(error, EINVAL, "CPUID table", "leaf 0 is missing");

    table->count = (uint32_t)count;
    find_places(table);
    table->max_basic = table->entries[0].eax;
    table->repeats_basic = !vendor_answers_zeros(&table->entries[0]);
    const struct pyhv_cpuid_entry *extended = find(table, RANGE_EXTENDED, 0);
    table->max_extended = extended ? extended->eax : 0;
    return 0;
}

/* Is `leaf` above the highest leaf of its range, or its range absent? KVM's ranges: 0x100 leaves a hypervisor
 * interface, 0x50000000 to 0x7FFFFFFF count as basic leaves, and everything from 0xC0000000 up is Centaur's. `entry`
 * is the one nearest to the leaf: the first leaf of a range that is not cached in the table is at most a few before it. */
static int out_of_range(const struct pyhv_cpuid_table *table, const struct pyhv_cpuid_entry *entry, uint32_t leaf)
{
    uint32_t first;

    if (leaf >= RANGE_CENTAUR)
        first = RANGE_CENTAUR;
    else if (leaf >= RANGE_EXTENDED)
        return leaf > table->max_extended;
    else if (leaf >= RANGE_HYPERVISOR && leaf <= RANGE_HYPERVISOR_END)
        first = leaf & 0xFFFFFF00;
    else
        return leaf > table->max_basic;
    while (entry->leaf > first || (entry->leaf == first && entry->subleaf > 0))
        entry--;
    return entry->leaf != first || leaf > entry->eax;
}

/* Bytes of an XSAVE area that holds `components` (an XCR0, OR-ed with IA32_XSS for the compacted format), by the sizes
 * and offsets in the table's own subleaves of leaf 0xD (SDM Vol. 1, 13.4.3). */
static uint32_t xsave_size(const struct pyhv_cpuid_table *table, const struct pyhv_cpuid_entry *entry,
                           uint64_t components, int compacted)
{
    const struct pyhv_cpuid_entry *end = table->entries + table->count;
    uint32_t size = XSAVE_LEGACY_SIZE;

    components &= ~XSAVE_LEGACY_COMPONENTS;
    for (; entry < end && entry->leaf == LEAF_XSTATE && entry->subleaf < 64; entry++) {
        uint64_t left = components >> entry->subleaf;
        uint32_t offset = entry->ebx;

        if (!left)
            break; /* subleaves are in order: nothing of interest follows */
        if (!(left & 1))
            continue;
        if (compacted)
            offset = entry->ecx & XSAVE_ALIGNED_TO_64 ? (size + 63) & ~UINT32_C(63) : size;
        size = offset + entry->eax > size ? offset + entry->eax : size;
    }
    return size;
}

static uint32_t with_bit(uint32_t word, uint32_t bit, int set)
{
    return set ? word | bit : word & ~bit;
}

/* What the entry says, with what depends on the vCPU's state brought up to date: kvm_update_cpuid_runtime()'s work. The
 * OS bits stay hidden without the feature they belong to: no processor lets CR4 have the bit then, but the host that
 * `trap` exists for does. */
static void answer_entry(const struct pyhv_cpuid_table *table, const struct pyhv_cpuid_dynamic *dynamic,
                         const struct pyhv_cpuid_entry *entry, uint32_t out[4])
{
    uint32_t eax = entry->eax, ebx = entry->ebx, ecx = entry->ecx, edx = entry->edx;

    if (entry->leaf == LEAF_FEATURES) {
        ecx = with_bit(ecx, PYHV_CPUID_1_ECX_OSXSAVE, (ecx & PYHV_CPUID_1_ECX_XSAVE) && (dynamic->cr4 & CR4_OSXSAVE));
        edx = with_bit(edx, PYHV_CPUID_1_EDX_APIC, (dynamic->apic_base & APIC_BASE_ENABLE) != 0);
    } else if (entry->leaf == LEAF_STRUCTURED_FEATURES && entry->subleaf == 0) {
        ecx = with_bit(ecx, PYHV_CPUID_7_ECX_OSPKE, (ecx & PYHV_CPUID_7_ECX_PKU) && (dynamic->cr4 & CR4_PKE));
    } else if (entry->leaf == LEAF_XSTATE && entry->subleaf == 0) {
        ebx = xsave_size(table, entry, dynamic->xcr0, 0);
    } else if (entry->leaf == LEAF_XSTATE && entry->subleaf == 1 &&
               (eax & (PYHV_CPUID_D1_EAX_XSAVEC | PYHV_CPUID_D1_EAX_XSAVES))) {
        ebx = xsave_size(table, entry, dynamic->xcr0 | dynamic->xss, 1);
    }
    out[0] = eax;
    out[1] = ebx;
    out[2] = ecx;
    out[3] = edx;
}

/* The answer where the table has no entry for the question; `entry` is the nearest one. */
static void answer_missing(const struct pyhv_cpuid_table *table, const struct pyhv_cpuid_dynamic *dynamic,
                           const struct pyhv_cpuid_entry *entry, uint32_t leaf, uint32_t subleaf, uint32_t out[4])
{
    if (table->repeats_basic && out_of_range(table, entry, leaf)) {
        leaf = table->max_basic; /* the subleaf stays the one that was asked for */
        entry = find(table, leaf, subleaf);
        if (entry) {
            answer_entry(table, dynamic, entry, out);
            return;
        }
    }

    memset(out, 0, 4 * sizeof out[0]);
    /* Beyond the last level of a topology leaf CL comes back in ECX[7:0], the level's type (ECX[15:8]) is "invalid",
     * and EDX still is the x2APIC id (SDM Vol. 2A, leaves 0BH and 1FH). The leaf exists when its subleaf 1 does. */
    if (leaf == LEAF_TOPOLOGY || leaf == LEAF_TOPOLOGY_V2) {
        entry = find(table, leaf, 1);
        if (entry) {
            out[2] = subleaf & 0xFF;
            out[3] = entry->edx;
        }
    }
}

void pyhv_cpuid_answer(const struct pyhv_cpuid_table *table, const struct pyhv_cpuid_dynamic *dynamic, uint32_t leaf,
                       uint32_t subleaf, uint32_t out[4])
{
    const struct pyhv_cpuid_entry *entry = nearest(table, leaf, subleaf);

    /* An entry that exists answers even where it lies above its range's maximum: KVM looks at maxima last. */
    if (answers(entry, leaf, subleaf))
        answer_entry(table, dynamic, entry, out);
    else
        answer_missing(table, dynamic, entry, leaf, subleaf, out);
}

void pyhv_cpuid_host(uint32_t leaf, uint32_t subleaf, uint32_t out[4])
{
    __cpuid_count(leaf, subleaf, out[0], out[1], out[2], out[3]);
}
