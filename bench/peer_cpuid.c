/* SPDX-License-Identifier: MIT
 *
 * The row `cpuid`: what one answer of pyhv_cpuid_answer() costs, and its peer's, a search of the table from its start as
 * KVM's kvm_find_cpuid_entry2() makes it, without any of the semantics that come on top.
 *
 * The table is that of the processor that runs this, read by CPUID itself. The questions are those of software that
 * looks for features, topology and caches, some of them out of range, in an order that no branch predictor learns.
 * Each request, "answer" or "search", is answered with the mean over ANSWERS answers.
 */
#include "peer.h"
#include "pyhv.h"

enum { QUESTIONS = 8192, ANSWERS = 20 * QUESTIONS };

static struct question {
    uint32_t leaf, subleaf;
} questions[QUESTIONS];

static struct pyhv_cpuid_table table;

static uint32_t next_random(void)
{
    static uint64_t state = UINT64_C(0x9e3779b97f4a7c15); /* always the same sequence: xorshift64 */
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (uint32_t)(state >> 32);
}

/* How many subleaves of a leaf software may look at; 0 where ECX has no meaning. */
static uint32_t subleaves_of(uint32_t leaf)
{
    switch (leaf) {
    case 0x4:
    case 0x8000001d:
        return 5;
    case 0x7:
    case 0xb:
    case 0xf:
    case 0x10:
    case 0x14:
    case 0x17:
    case 0x1f:
        return 3;
    case 0xd:
        return 20;
    default:
        return 0;
    }
}

static size_t read_range(struct pyhv_cpuid_entry *entries, size_t count, uint32_t first)
{
    uint32_t out[4];
    pyhv_cpuid_host(first, 0, out);
    uint32_t last = out[0];
    if (last < first || last - first > 0xff)
        return count;
    for (uint32_t leaf = first; leaf <= last; leaf++) {
        uint32_t subleaves = subleaves_of(leaf);
        for (uint32_t subleaf = 0; subleaf < (subleaves ? subleaves : 1); subleaf++) {
            pyhv_cpuid_host(leaf, subleaf, out);
            if ((subleaf > 0 && !(out[0] | out[1] | out[2] | out[3])) || count == PYHV_CPUID_MAX_ENTRIES)
                continue;
            entries[count++] = (struct pyhv_cpuid_entry){
                .leaf = leaf,
                .subleaf = subleaf,
                .indexed = subleaves > 0,
                .eax = out[0],
                .ebx = out[1],
                .ecx = out[2],
                .edx = out[3],
            };
        }
    }
    return count;
}

static void prepare(void)
{
    static struct pyhv_cpuid_entry entries[PYHV_CPUID_MAX_ENTRIES];
    struct pyhv_error error = {0};
    size_t count = read_range(entries, 0, 0);
    count = read_range(entries, count, 0x40000000);
    count = read_range(entries, count, 0x80000000);
    if (pyhv_cpuid_table_init(&table, entries, count, &error) < 0) {
        fprintf(stderr, "%s: %s\n", error.what, error.detail);
        exit(1);
    }
    for (size_t i = 0; i < QUESTIONS; i++) {
        const struct pyhv_cpuid_entry *entry = &table.entries[next_random() % table.count];
        questions[i] = (struct question){entry->leaf, entry->indexed ? entry->subleaf : next_random() % 4};
        switch (next_random() % 32) {
        case 0: /* the subleaf after the last, where enumeration ends */
            questions[i].subleaf += subleaves_of(entry->leaf);
            break;
        case 1: /* out of its range */
            questions[i].leaf += 0x100;
            break;
        }
    }
}

static const struct pyhv_cpuid_entry *search(uint32_t leaf, uint32_t subleaf)
{
    for (uint32_t i = 0; i < table.count; i++) {
        const struct pyhv_cpuid_entry *entry = &table.entries[i];
        if (entry->leaf == leaf && (!entry->indexed || entry->subleaf == subleaf))
            return entry;
    }
    return NULL;
}

static volatile uint32_t sink; /* keeps the answers from being optimized away */

static double sample(const char *request)
{
    const struct pyhv_cpuid_dynamic dynamic = {.cr4 = 0x406f0, .xcr0 = 0xe7, .apic_base = 0xfee00900};
    uint32_t out[4], sum = 0;
    int ours = strcmp(request, "answer") == 0;
    double start = now_ns();
    if (ours) {
        for (size_t i = 0; i < ANSWERS; i++) {
            const struct question *question = &questions[i % QUESTIONS];
            pyhv_cpuid_answer(&table, &dynamic, question->leaf, question->subleaf, out);
            sum += out[0] ^ out[1] ^ out[2] ^ out[3];
        }
    } else {
        for (size_t i = 0; i < ANSWERS; i++) {
            const struct question *question = &questions[i % QUESTIONS];
            const struct pyhv_cpuid_entry *entry = search(question->leaf, question->subleaf);
            if (entry)
                sum += entry->eax ^ entry->ebx ^ entry->ecx ^ entry->edx;
        }
    }
    double took = now_ns() - start;
    sink = sum;
    return took / ANSWERS;
}

int main(void)
{
    prepare();
    return serve(sample);
}
