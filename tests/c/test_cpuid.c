/* SPDX-License-Identifier: MIT
 *
 * csrc/cpuid.c: one table of questions and answers, and what table_init refuses.
 */
#include "pyhv.h"

#include "check.h"

#include <stdlib.h>

#define INTEL .ebx = 0x756E6547, .ecx = 0x6C65746E, .edx = 0x49656E69
#define AMD   .ebx = 0x68747541, .ecx = 0x444D4163, .edx = 0x69746E65
#define HYGON .ebx = 0x6F677948, .ecx = 0x656E6975, .edx = 0x6E65476E
#define KVM   .ebx = 0x4B4D564B, .ecx = 0x564B4D56, .edx = 0x4D

#define XSAVE     (1u << 26)
#define OSXSAVE   (1u << 27)
#define APIC      (1u << 9)
#define PKU       (1u << 3)
#define OSPKE     (1u << 4)
#define XSAVEC    (1u << 1)
#define XSAVES    (1u << 3)
#define CR4_OSX   (1u << 18)
#define CR4_PKE   (1u << 22)
#define APIC_BASE 0xFEE00000u
#define APIC_ON   (APIC_BASE | 1u << 11)
#define LENGTH(a) (sizeof(a) / sizeof((a)[0]))

/* Written out of order on purpose. Leaf 0xC lies in range and is absent; leaf 0x1F is the highest; component 9 comes
 * after a gap and 11 and 12 exist in the compacted format only, 12 of them aligned. */
#define COMMON_ENTRIES                                                                                                \
    {.leaf = 0x80000001, .eax = 0x77, .ebx = 0x78, .ecx = 0x79, .edx = 0x7A},                                         \
        {.leaf = 0xD, .subleaf = 12, .indexed = 1, .eax = 0x18, .ecx = 3},                                            \
        {.leaf = 0xD, .subleaf = 0, .indexed = 1, .eax = 0x2E7, .ebx = 0x240, .ecx = 0xA88},                          \
        {.leaf = 0xD, .subleaf = 1, .indexed = 1, .eax = 0xF, .ebx = 1, .ecx = 0x1800},                               \
        {.leaf = 0xD, .subleaf = 2, .indexed = 1, .eax = 0x100, .ebx = 0x240},                                        \
        {.leaf = 0xD, .subleaf = 5, .indexed = 1, .eax = 0x40, .ebx = 0x440},                                         \
        {.leaf = 0xD, .subleaf = 6, .indexed = 1, .eax = 0x200, .ebx = 0x480},                                        \
        {.leaf = 0xD, .subleaf = 7, .indexed = 1, .eax = 0x400, .ebx = 0x680},                                        \
        {.leaf = 0xD, .subleaf = 9, .indexed = 1, .eax = 8, .ebx = 0xA80},                                            \
        {.leaf = 0xD, .subleaf = 11, .indexed = 1, .eax = 0x10, .ecx = 1},                                            \
        {.leaf = 1, .eax = 0x000906E9, .ebx = 0x00010800, .ecx = XSAVE | 1, .edx = APIC | 1},                         \
        {.leaf = 4, .subleaf = 0, .indexed = 1, .eax = 0x121}, {.leaf = 4, .subleaf = 1, .indexed = 1, .eax = 0x122}, \
        {.leaf = 7, .subleaf = 0, .indexed = 1, .eax = 1, .ecx = PKU | OSPKE},                                        \
        {.leaf = 7, .subleaf = 1, .indexed = 1, .eax = 0x30, .ecx = PKU},                                             \
        {.leaf = 0xB, .subleaf = 0, .indexed = 1, .eax = 0, .ebx = 1, .ecx = 0x100, .edx = 6},                        \
        {.leaf = 0xB, .subleaf = 1, .indexed = 1, .eax = 3, .ebx = 8, .ecx = 0x201, .edx = 6},                        \
        {.leaf = 0x1F, .subleaf = 0, .indexed = 1, .eax = 0, .ebx = 1, .ecx = 0x100, .edx = 6},                       \
        {.leaf = 0x1F, .subleaf = 1, .indexed = 1, .eax = 3, .ebx = 8, .ecx = 0x201, .edx = 6},                       \
        {.leaf = 0x40000000, .eax = 0x40000001, KVM}, {.leaf = 0x40000001, .eax = 0x01000009},                        \
        {.leaf = 0x40000100, .eax = 0x40000102, .ebx = 5}, {.leaf = 0x90000000, .eax = 0x99},                         \
    {                                                                                                                 \
        .leaf = 0x80000000, .eax = 0x80000008                                                                         \
    }

static const struct pyhv_cpuid_entry intel_entries[] = {{.leaf = 0, .eax = 0x1F, INTEL}, COMMON_ENTRIES};
static const struct pyhv_cpuid_entry amd_entries[] = {{.leaf = 0, .eax = 0x1F, AMD}, COMMON_ENTRIES};
static const struct pyhv_cpuid_entry hygon_entries[] = {{.leaf = 0, .eax = 0x1F, HYGON}, COMMON_ENTRIES};
/* The highest basic leaf is plain and repeated as it is; no extended range and no hypervisor. */
static const struct pyhv_cpuid_entry small_entries[] = {
    {.leaf = 0, .eax = 2, INTEL},
    {.leaf = 1, .ecx = OSXSAVE, .edx = 0},
    {.leaf = 2, .eax = 0x605B5001, .ebx = 1, .ecx = 2, .edx = 0x007D7040},
};
/* The highest basic leaf is leaf 1: what is repeated is brought up to date too. */
static const struct pyhv_cpuid_entry tiny_entries[] = {{.leaf = 0, .eax = 1, INTEL},
                                                       {.leaf = 1, .ecx = XSAVE, .edx = 1}};
/* XSAVE without XSAVEC and XSAVES. */
static const struct pyhv_cpuid_entry plain_xsave_entries[] = {
    {.leaf = 0, .eax = 0xD, AMD},
    {.leaf = 0xD, .subleaf = 0, .indexed = 1, .eax = 7, .ebx = 0x1234, .ecx = 0x340},
    {.leaf = 0xD, .subleaf = 1, .indexed = 1, .eax = 1, .ebx = 0x55},
    {.leaf = 0xD, .subleaf = 2, .indexed = 1, .eax = 0x100, .ebx = 0x240},
    {.leaf = 0xD, .subleaf = 62, .indexed = 1, .eax = 0x80, .ebx = 0x340},
    {.leaf = 0xD, .subleaf = 63, .indexed = 1, .eax = 0x80, .ebx = 0x3C0},
    {.leaf = 0xD, .subleaf = 64, .indexed = 1, .eax = 0x80, .ebx = 0x440},
};

/* An interface whose first leaf obeys ECX: subleaf 0 is the one that names the highest leaf. */
static const struct pyhv_cpuid_entry odd_entries[] = {
    {.leaf = 0, .eax = 7, INTEL},
    {.leaf = 7, .subleaf = 0, .indexed = 1, .eax = 9, .ecx = OSPKE},
    {.leaf = 0x40000000, .subleaf = 0, .indexed = 1, .eax = 0x40000001},
    {.leaf = 0x40000000, .subleaf = 1, .indexed = 1, .eax = 0x400000FF},
};

static struct pyhv_cpuid_table odd, intel, amd, hygon, small, tiny, plain_xsave;

static const struct question {
    const char *what;
    const struct pyhv_cpuid_table *table;
    struct pyhv_cpuid_dynamic dynamic;
    uint32_t leaf, subleaf;
    uint32_t answer[4];
} questions[] = {
    {"a plain leaf", &intel, {0}, 0x80000001, 0, {0x77, 0x78, 0x79, 0x7A}},
    {"ECX ignored", &intel, {0}, 0x80000001, 0xFFFFFFFF, {0x77, 0x78, 0x79, 0x7A}},
    {"leaf 0, any subleaf", &amd, {0}, 0, 9, {0x1F, 0x68747541, 0x444D4163, 0x69746E65}},
    {"subleaf 1", &intel, {0}, 4, 1, {0x122, 0, 0, 0}},
    {"a subleaf that is absent", &intel, {0}, 4, 2, {0, 0, 0, 0}},
    {"a leaf in range that is absent", &intel, {0}, 0xC, 0, {0, 0, 0, 0}},
    {"an extended leaf in range that is absent", &intel, {0}, 0x80000008, 0, {0, 0, 0, 0}},

    {"OSXSAVE and APIC off", &intel, {.apic_base = APIC_BASE}, 1, 0, {0x000906E9, 0x00010800, XSAVE | 1, 1}},
    {"OSXSAVE follows CR4", &intel, {.cr4 = CR4_OSX}, 1, 0, {0x000906E9, 0x00010800, XSAVE | OSXSAVE | 1, 1}},
    {"APIC follows its base", &intel, {.apic_base = APIC_ON}, 1, 7, {0x000906E9, 0x00010800, XSAVE | 1, APIC | 1}},
    {"no OSXSAVE without XSAVE", &small, {.cr4 = CR4_OSX}, 1, 0, {0, 0, 0, 0}},
    {"APIC appears by its base alone", &small, {.apic_base = APIC_ON}, 1, 0, {0, 0, 0, APIC}},
    {"OSPKE off", &intel, {0}, 7, 0, {1, 0, PKU, 0}},
    {"OSPKE follows CR4", &intel, {.cr4 = CR4_PKE}, 7, 0, {1, 0, PKU | OSPKE, 0}},
    {"no OSPKE without PKU", &odd, {.cr4 = CR4_PKE}, 7, 0, {9, 0, 0, 0}},
    {"OSPKE is a bit of subleaf 0 only", &intel, {.cr4 = CR4_PKE}, 7, 1, {0x30, 0, PKU, 0}},

    {"XSAVE size: x87 only", &intel, {.xcr0 = 1}, 0xD, 0, {0x2E7, 0x240, 0xA88, 0}},
    {"XSAVE size: AVX", &intel, {.xcr0 = 7}, 0xD, 0, {0x2E7, 0x340, 0xA88, 0}},
    {"XSAVE size: AVX-512", &intel, {.xcr0 = 0xE7}, 0xD, 0, {0x2E7, 0xA80, 0xA88, 0}},
    {"XSAVE size: PKRU without AVX", &intel, {.xcr0 = 0x203}, 0xD, 0, {0x2E7, 0xA88, 0xA88, 0}},
    {"XSAVE size: a component the table lacks", &intel, {.xcr0 = 0x60003}, 0xD, 0, {0x2E7, 0x240, 0xA88, 0}},
    {"compacted: x87 only", &intel, {.xcr0 = 1}, 0xD, 1, {0xF, 0x240, 0x1800, 0}},
    {"compacted: PKRU right behind AVX", &intel, {.xcr0 = 0x207}, 0xD, 1, {0xF, 0x348, 0x1800, 0}},
    {"compacted: with a supervisor component", &intel, {.xcr0 = 0x207, .xss = 0x800}, 0xD, 1, {0xF, 0x358, 0x1800, 0}},
    {"compacted: an aligned one", &intel, {.xcr0 = 0x207, .xss = 0x1800}, 0xD, 1, {0xF, 0x398, 0x1800, 0}},
    {"compacted: none but the aligned one", &intel, {.xcr0 = 1, .xss = 0x1000}, 0xD, 1, {0xF, 0x258, 0x1800, 0}},
    {"IA32_XSS is not in the standard layout", &intel, {.xcr0 = 3, .xss = 0x1800}, 0xD, 0, {0x2E7, 0x240, 0xA88, 0}},
    {"a component's own subleaf", &intel, {.xcr0 = 7}, 0xD, 9, {8, 0xA80, 0, 0}},
    {"no compacted format: EBX stays", &plain_xsave, {.xcr0 = 7}, 0xD, 1, {1, 0x55, 0, 0}},
    {"component 62", &plain_xsave, {.xcr0 = UINT64_C(1) << 62 | 3}, 0xD, 0, {7, 0x3C0, 0x340, 0}},
    {"component 63 is the last", &plain_xsave, {.xcr0 = UINT64_MAX}, 0xD, 0, {7, 0x440, 0x340, 0}},

    {"beyond the last level of 0xB", &intel, {0}, 0xB, 2, {0, 0, 2, 6}},
    {"CL alone comes back", &intel, {0}, 0xB, 0x12345678, {0, 0, 0x78, 6}},
    {"beyond the last level of 0x1F", &amd, {0}, 0x1F, 0xFF, {0, 0, 0xFF, 6}},
    {"no leaf 0xB at all", &plain_xsave, {0}, 0xB, 2, {0, 0, 0, 0}},

    {"Intel: above the basic range", &intel, {0}, 0x20, 1, {3, 8, 0x201, 6}},
    {"Intel: the asked subleaf is kept", &intel, {0}, 0x3FFFFFFF, 5, {0, 0, 5, 6}},
    {"Intel: 0x50000000 counts as basic", &intel, {0}, 0x50000000, 0, {0, 1, 0x100, 6}},
    {"Intel: 0x7FFFFFFF counts as basic", &intel, {0}, 0x7FFFFFFF, 0, {0, 1, 0x100, 6}},
    {"Intel: above the extended range", &intel, {0}, 0x80000009, 0, {0, 1, 0x100, 6}},
    {"Intel: above the maximum but present", &intel, {0}, 0x90000000, 0, {0x99, 0, 0, 0}},
    {"Intel: above the hypervisor's range", &intel, {0}, 0x40000002, 1, {3, 8, 0x201, 6}},
    {"Intel: a second hypervisor interface", &intel, {0}, 0x40000100, 0, {0x40000102, 5, 0, 0}},
    {"Intel: within the second interface but absent", &intel, {0}, 0x40000102, 0, {0, 0, 0, 0}},
    {"Intel: above the second interface", &intel, {0}, 0x40000103, 0, {0, 1, 0x100, 6}},
    {"Intel: the highest leaf is subleaf 0's to name", &odd, {.cr4 = 0}, 0x40000002, 0, {9, 0, 0, 0}},
    {"Intel: an absent interface", &intel, {0}, 0x40000200, 0, {0, 1, 0x100, 6}},
    {"Intel: Centaur's range is absent", &intel, {0}, 0xC0000000, 0, {0, 1, 0x100, 6}},
    {"Intel: the last leaf of all", &intel, {0}, 0xFFFFFFFF, 0, {0, 1, 0x100, 6}},
    {"Intel: no extended range", &small, {0}, 0x80000000, 0, {0x605B5001, 1, 2, 0x007D7040}},
    {"Intel: no hypervisor", &small, {0}, 0x40000000, 3, {0x605B5001, 1, 2, 0x007D7040}},
    {"Intel: the repeated leaf is up to date",
     &tiny,
     {.cr4 = CR4_OSX, .apic_base = APIC_ON},
     5,
     0,
     {0, 0, XSAVE | OSXSAVE, APIC | 1}},

    {"AMD: above the basic range", &amd, {0}, 0x20, 1, {0, 0, 0, 0}},
    {"AMD: above the extended range", &amd, {0}, 0x8FFFFFFF, 0, {0, 0, 0, 0}},
    {"AMD: above the hypervisor's range", &amd, {0}, 0x40000002, 0, {0, 0, 0, 0}},
    {"AMD: above the maximum but present", &amd, {0}, 0x90000000, 0, {0x99, 0, 0, 0}},
    {"Hygon answers as AMD does", &hygon, {0}, 0x20, 1, {0, 0, 0, 0}},
};

static int answered(const struct question *question, uint32_t got[4])
{
    memset(got, 0xA5, 4 * sizeof got[0]);
    pyhv_cpuid_answer(question->table, &question->dynamic, question->leaf, question->subleaf, got);
    return memcmp(got, question->answer, sizeof question->answer) == 0;
}

static void ask_everything(void)
{
    uint32_t got[4];

    for (size_t i = 0; i < LENGTH(questions); i++) {
        const struct question *q = &questions[i];
        int right = answered(q, got);

        CHECK(right);
        if (!right)
            fprintf(stderr,
                    "  %s: leaf 0x%x subleaf 0x%x\n  expected %08x %08x %08x %08x\n  got      %08x %08x %08x %08x\n",
                    q->what, q->leaf, q->subleaf, q->answer[0], q->answer[1], q->answer[2], q->answer[3], got[0],
                    got[1], got[2], got[3]);
    }

    /* The check above can fail: each register of a right answer, spoilt. */
    for (int i = 0; i < 4; i++) {
        struct question spoilt = questions[0];

        spoilt.answer[i] ^= 1;
        CHECK(!answered(&spoilt, got));
    }
}

static void refuses(const char *detail, const struct pyhv_cpuid_entry *entries, size_t count)
{
    static struct pyhv_cpuid_table table;
    struct pyhv_error error = {0};

    CHECK_EQUAL(pyhv_cpuid_table_init(&table, entries, count, &error), -1);
    CHECK(strcmp(error.what, "CPUID table") == 0);
    CHECK(strcmp(error.detail, detail) == 0);
    if (strcmp(error.detail, detail) != 0)
        fprintf(stderr, "  expected \"%s\", got \"%s\"\n", detail, error.detail);
    CHECK_EQUAL(pyhv_cpuid_table_init(&table, entries, count, NULL), -1);
}

static void refuse_bad_tables(void)
{
    /* Of the exact size, so that AddressSanitizer sees the first byte read beyond. */
    struct pyhv_cpuid_entry *many = calloc(PYHV_CPUID_MAX_ENTRIES + 1, sizeof *many);
    struct pyhv_cpuid_entry twice[] = {
        {.leaf = 0}, {.leaf = 4, .indexed = 1, .subleaf = 3}, {.leaf = 1}, {.leaf = 4, .indexed = 1, .subleaf = 3}};
    struct pyhv_cpuid_entry twice_plain[] = {{.leaf = 0}, {.leaf = 1}, {.leaf = 1}};
    struct pyhv_cpuid_entry both[] = {{.leaf = 0}, {.leaf = 4, .indexed = 1, .subleaf = 1}, {.leaf = 4}};
    struct pyhv_cpuid_entry stray[] = {{.leaf = 0}, {.leaf = 0x80000001, .subleaf = 2}};
    struct pyhv_cpuid_entry beheaded[] = {{.leaf = 0, .indexed = 1, .subleaf = 1}, {.leaf = 1}};
    struct pyhv_cpuid_entry headless[] = {{.leaf = 1}, {.leaf = 2}};
    static struct pyhv_cpuid_table table;
    struct pyhv_cpuid_dynamic dynamic = {0};
    uint32_t got[4];

    if (!many)
        abort();
    for (uint32_t i = 0; i <= PYHV_CPUID_MAX_ENTRIES; i++)
        many[i] = (struct pyhv_cpuid_entry){.leaf = PYHV_CPUID_MAX_ENTRIES - i, .eax = i};
    refuses("257 entries, at most 256 are possible", many, PYHV_CPUID_MAX_ENTRIES + 1);
    refuses("two entries for leaf 0x4 subleaf 0x3", twice, LENGTH(twice));
    refuses("two entries for leaf 0x1 subleaf 0x0", twice_plain, LENGTH(twice_plain));
    refuses("leaf 0x4 both ignores and obeys ECX", both, LENGTH(both));
    refuses("leaf 0x80000001: subleaf 0x2 of a leaf that ignores ECX", stray, LENGTH(stray));
    refuses("leaf 0 is missing", headless, LENGTH(headless));
    refuses("leaf 0 is missing", beheaded, LENGTH(beheaded));
    refuses("leaf 0 is missing", NULL, 0);

    /* A full table, backwards. */
    CHECK_EQUAL(pyhv_cpuid_table_init(&table, many + 1, PYHV_CPUID_MAX_ENTRIES, NULL), 0);
    CHECK_EQUAL(table.count, PYHV_CPUID_MAX_ENTRIES);
    for (uint32_t i = 1; i <= PYHV_CPUID_MAX_ENTRIES; i++) {
        uint32_t leaf = PYHV_CPUID_MAX_ENTRIES - i;

        if (leaf == 1 || leaf == 7 || leaf == 0xD)
            continue; /* have dynamic bits */
        pyhv_cpuid_answer(&table, &dynamic, leaf, 0, got);
        CHECK_EQUAL(got[0], i);
    }
    free(many);
}

static void init(struct pyhv_cpuid_table *table, const struct pyhv_cpuid_entry *entries, size_t count)
{
    struct pyhv_error error = {0};

    CHECK_EQUAL(pyhv_cpuid_table_init(table, entries, count, &error), 0);
    CHECK_EQUAL(table->count, count);
    for (size_t i = 1; i < count; i++)
        CHECK(((uint64_t)table->entries[i - 1].leaf << 32 | table->entries[i - 1].subleaf) <
              ((uint64_t)table->entries[i].leaf << 32 | table->entries[i].subleaf));
}

/* What the build machine's processor says of itself is all that can be known of the answer. */
static void ask_this_processor(void)
{
    uint32_t got[4] = {0};

    pyhv_cpuid_host(0, 0, got);
    CHECK(got[0] >= 1);
    CHECK(got[1] != 0 && got[2] != 0 && got[3] != 0);
}

int main(void)
{
    init(&odd, odd_entries, LENGTH(odd_entries));
    init(&intel, intel_entries, LENGTH(intel_entries));
    init(&amd, amd_entries, LENGTH(amd_entries));
    init(&hygon, hygon_entries, LENGTH(hygon_entries));
    init(&small, small_entries, LENGTH(small_entries));
    init(&tiny, tiny_entries, LENGTH(tiny_entries));
    init(&plain_xsave, plain_xsave_entries, LENGTH(plain_xsave_entries));
    CHECK_EQUAL(intel.max_basic, 0x1F);
    CHECK_EQUAL(intel.max_extended, 0x80000008);
    CHECK_EQUAL(intel.repeats_basic, 1);
    CHECK_EQUAL(amd.repeats_basic, 0);
    CHECK_EQUAL(small.max_extended, 0);
    ask_everything();
    refuse_bad_tables();
    ask_this_processor();
    return check_report("test_cpuid");
}
