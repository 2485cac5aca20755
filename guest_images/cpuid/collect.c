/* SPDX-License-Identifier: MIT
 *
 * Which leaves and subleaves there are to ask for. The numbers are those of the SDM, Vol. 2, "CPUID", and of the APM,
 * Vol. 3, appendix E; they are written out here and not taken from pyhv's own feature table, because this guest is
 * what that table is checked with.
 *
 * Nothing that CPUID answers is trusted to end a loop: a range has at most RANGE leaves, a leaf at most SUBLEAVES
 * subleaves, the whole at most MAX_ANSWERS answers.
 */
#include "cpuid.h"

enum { RANGE = 256, SUBLEAVES = 64 };

USER_TEXT static struct registers ask(struct answers *answers, uint32_t leaf, uint32_t subleaf)
{
    if (answers->count == MAX_ANSWERS) {
        answers->dropped++;
        return (struct registers){0};
    }
    struct answer *answer = &answers->list[answers->count++];
    answer->leaf = leaf;
    answer->subleaf = subleaf;
    cpuid(leaf, subleaf, &answer->registers);
    return answer->registers;
}

/* Subleaves 1 to `last`. */
USER_TEXT static void ask_up_to(struct answers *answers, uint32_t leaf, uint32_t last)
{
    for (uint32_t subleaf = 1; subleaf <= last && subleaf < SUBLEAVES; subleaf++)
        ask(answers, leaf, subleaf);
}

/* The subleaves from `first` on whose bits are set in `mask`. */
USER_TEXT static void ask_by_mask(struct answers *answers, uint32_t leaf, uint32_t first, uint64_t mask)
{
    mask >>= first;
    for (uint32_t subleaf = first; mask; subleaf++, mask >>= 1)
        if (mask & 1)
            ask(answers, leaf, subleaf);
}

/* Subleaves from `first` on, up to and with the one whose EAX & `eax_mask` and ECX & `ecx_mask` are zero. */
USER_TEXT static void ask_until_none(struct answers *answers, uint32_t leaf, uint32_t first, uint32_t eax_mask,
                                     uint32_t ecx_mask)
{
    for (uint32_t subleaf = first; subleaf < SUBLEAVES; subleaf++) {
        struct registers answer = ask(answers, leaf, subleaf);
        if (!(answer.eax & eax_mask) && !(answer.ecx & ecx_mask))
            return;
    }
}

/* Subleaf 0 of `leaf` and whatever other subleaves it has. */
USER_TEXT static void ask_leaf(struct answers *answers, uint32_t leaf)
{
    struct registers first = ask(answers, leaf, 0), second;

    switch (leaf) {
    case 0x4:        /* caches, EAX[4:0]: type of the cache */
    case 0x8000001d: /* the same of AMD */
        if (first.eax & 0x1f)
            ask_until_none(answers, leaf, 1, 0x1f, 0);
        break;
    case 0x7:  /* features */
    case 0x14: /* processor trace */
    case 0x17: /* vendor of a system on a chip */
    case 0x18: /* address translation */
    case 0x1d: /* tiles */
    case 0x1e: /* tile multiplication */
    case 0x20: /* history reset */
    case 0x24: /* AVX10 */
        ask_up_to(answers, leaf, first.eax);
        break;
    case 0xb:        /* topology, ECX[15:8]: type of the level */
    case 0x1f:       /* topology, more kinds of levels */
    case 0x80000026: /* the same of AMD */
        if (first.ecx & 0xff00)
            ask_until_none(answers, leaf, 1, 0, 0xff00);
        break;
    case 0xd: /* XSAVE: the components of XCR0 in subleaf 0, those of IA32_XSS in subleaf 1 */
        second = ask(answers, leaf, 1);
        ask_by_mask(answers, leaf, 2, first.eax | second.ecx | (uint64_t)(first.edx | second.edx) << 32);
        break;
    case 0xf: /* monitoring of shared resources */
        ask_by_mask(answers, leaf, 1, first.edx);
        break;
    case 0x10:       /* allocation of shared resources */
    case 0x80000020: /* the same of AMD */
        ask_by_mask(answers, leaf, 1, first.ebx);
        break;
    case 0x12: /* SGX: two subleaves, then one an EPC section, EAX[3:0]: type of the section */
        ask(answers, leaf, 1);
        ask_until_none(answers, leaf, 2, 0xf, 0);
        break;
    case 0x1b: /* PCONFIG, EAX[11:0]: type of the subleaf */
        if (first.eax & 0xfff)
            ask_until_none(answers, leaf, 1, 0xfff, 0);
        break;
    case 0x23: /* performance monitoring, EAX: which subleaves there are */
        ask_by_mask(answers, leaf, 1, first.eax);
        break;
    }
}

/* The leaf `base`, whose EAX is the last leaf of its range, and the range. */
USER_TEXT static void ask_range(struct answers *answers, uint32_t base)
{
    struct registers first = ask(answers, base, 0);
    uint32_t more = first.eax - base; /* huge where EAX lies below the range: then there is no range */
    if (more >= RANGE) {
        /* A basic range that claims more than there can be is asked as far as RANGE, in case it hides something. */
        if (base != 0)
            return;
        more = RANGE - 1;
    }
    for (uint32_t leaf = base + 1; leaf <= base + more; leaf++)
        ask_leaf(answers, leaf);
}

USER_TEXT void collect(struct answers *answers)
{
    ask_range(answers, 0);
    ask_range(answers, 0x40000000); /* what the hypervisor says of itself */
    ask_range(answers, 0x80000000);
}
