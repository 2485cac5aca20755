/* SPDX-License-Identifier: MIT
 *
 * instructions: executes one instruction of each set that compatibility mode hides, and sets each bit of CR4 that such a
 * feature unlocks, and prints what became of it. It proves what "hidden is not blocked" means on a host:
 *
 *     NAME visible|hidden runs|#UD|#GP|...
 *
 * `visible` is what CPUID says. "runs as BSR": the processor took LZCNT, which is BSR with a prefix, for BSR.
 *
 * Not here: misaligned SSE, which is a mode and no instruction; XOP, whose first byte some emulators take for POP, and
 * crash. An interpreting KVM cannot run this guest.
 */
#include "guest.h"

NOTE_USER_MODE("");

enum { CR4_OSXSAVE_BIT = 18, INVALID_OPCODE = 6 };

int try_code(void (*code)(void));
_Noreturn void try_failed(uint64_t vector);

static bool trying;

/* What LZCNT and TZCNT gave. */
uint32_t counted;

void exception_handler(const struct exception *exception)
{
    if (!trying)
        exception_report(exception);
    trying = false;
    try_failed(exception->vector);
}

/* Written as bytes: the assembler must not refuse what it has not been told to know, and a prefix must stay one. */
#define CODE(name, text)                                  \
    void code_##name(void);                               \
    __asm__(".pushsection .text.code_" #name ", \"ax\"\n" \
            ".globl code_" #name "\n"                     \
            "code_" #name ":\n" text "\nret\n"            \
            ".popsection\n")

CODE(ssse3, ".byte 0x66, 0x0f, 0x38, 0x00, 0xc8");            /* pshufb xmm1, xmm0 */
CODE(sse4_1, ".byte 0x66, 0x0f, 0x38, 0x40, 0xc8");           /* pmulld xmm1, xmm0 */
CODE(sse4_2, ".byte 0x66, 0x0f, 0x38, 0x37, 0xc8");           /* pcmpgtq xmm1, xmm0 */
CODE(popcnt, ".byte 0xf3, 0x0f, 0xb8, 0xc1");                 /* popcnt eax, ecx */
CODE(abm, ".byte 0xf3, 0x0f, 0xbd, 0xc1\nmov %eax, counted"); /* lzcnt eax, ecx: 31, by BSR 0 */
CODE(bmi1_tzcnt, "xor %ecx, %ecx\nmov $77, %eax\n"            /* tzcnt eax, ecx of 0: 32, by BSF unchanged */
                 ".byte 0xf3, 0x0f, 0xbc, 0xc1\nmov %eax, counted");
CODE(sse4a, ".byte 0x66, 0x0f, 0x78, 0xc0, 0x01, 0x01");     /* extrq xmm0, 1, 1 */
CODE(3dnow, ".byte 0x0f, 0x0f, 0xc0, 0x9e\nemms");           /* pfadd mm0, mm0 */
CODE(3dnowext, ".byte 0x0f, 0x0f, 0xc0, 0xbb\nemms");        /* pswapd mm0, mm0 */
CODE(fma4, ".byte 0xc4, 0xe3, 0xf9, 0x69, 0xc0, 0x00");      /* vfmaddpd xmm0, xmm0, xmm0, xmm0 */
CODE(avx, ".byte 0xc5, 0xfc, 0x58, 0xc0");                   /* vaddps ymm0, ymm0, ymm0 */
CODE(f16c, ".byte 0xc4, 0xe2, 0x7d, 0x13, 0xc0");            /* vcvtph2ps ymm0, xmm0 */
CODE(fma, ".byte 0xc4, 0xe2, 0x7d, 0x98, 0xc0");             /* vfmadd132ps ymm0, ymm0, ymm0 */
CODE(avx2, ".byte 0xc5, 0xfd, 0xfe, 0xc0");                  /* vpaddd ymm0, ymm0, ymm0 */
CODE(bmi1, ".byte 0xc4, 0xe2, 0x78, 0xf2, 0xc0");            /* andn eax, eax, eax */
CODE(bmi2, ".byte 0xc4, 0xe2, 0x7b, 0xf5, 0xc0");            /* pdep eax, eax, eax */
CODE(aes, ".byte 0x66, 0x0f, 0x38, 0xdc, 0xc8");             /* aesenc xmm1, xmm0 */
CODE(pclmulqdq, ".byte 0x66, 0x0f, 0x3a, 0x44, 0xc8, 0x00"); /* pclmulqdq xmm1, xmm0, 0 */
CODE(sha_ni, ".byte 0x0f, 0x38, 0xc8, 0xc1");                /* sha1nexte xmm0, xmm1 */
CODE(movbe, ".byte 0x0f, 0x38, 0xf0, 0x06");                 /* movbe eax, [rsi] */
CODE(adx, ".byte 0x66, 0x0f, 0x38, 0xf6, 0xc1");             /* adcx eax, ecx */
CODE(rdrand, ".byte 0x0f, 0xc7, 0xf0");                      /* rdrand eax */
CODE(rdseed, ".byte 0x0f, 0xc7, 0xf8");                      /* rdseed eax */
CODE(rdtscp, ".byte 0x0f, 0x01, 0xf9");                      /* rdtscp */
CODE(clflushopt, ".byte 0x66, 0x0f, 0xae, 0x3e");            /* clflushopt [rsi] */
CODE(clwb, ".byte 0x66, 0x0f, 0xae, 0x36");                  /* clwb [rsi] */
CODE(prefetchw, ".byte 0x0f, 0x0d, 0x0e");                   /* prefetchw [rsi] */
CODE(xsave, "xor %ecx, %ecx\n.byte 0x0f, 0x01, 0xd0");       /* xgetbv of XCR0 */

/* CR4 with one bit more; it stays set where that is allowed. */
#define CR4_CODE(name, bit) CODE(name, "mov %cr4, %rax\nbts $" #bit ", %rax\nmov %rax, %cr4")
CR4_CODE(cr4_osxsave, 18);
CR4_CODE(cr4_umip, 11);
CR4_CODE(cr4_fsgsbase, 16);
CR4_CODE(cr4_pcide, 17);
CR4_CODE(cr4_smep, 20);
CR4_CODE(cr4_smap, 21);
CR4_CODE(cr4_pke, 22);

/* XCR0 = x87, SSE and AVX: what AVX instructions need besides OSXSAVE. */
CODE(enable_avx, "xor %ecx, %ecx\nxor %edx, %edx\nmov $7, %eax\n.byte 0x0f, 0x01, 0xd1");

enum reg { EAX, EBX, ECX, EDX };

static const struct attempt {
    const char *name;
    void (*code)(void);
    uint32_t leaf, subleaf;
    enum reg reg;
    uint32_t bit;
    uint32_t counts; /* with `as`: what the real instruction counts */
    const char *as;  /* what older processors take it for */
} attempts[] = {
    {"ssse3", code_ssse3, 0x1, 0, ECX, 9, 0, NULL},
    {"sse4_1", code_sse4_1, 0x1, 0, ECX, 19, 0, NULL},
    {"sse4_2", code_sse4_2, 0x1, 0, ECX, 20, 0, NULL},
    {"popcnt", code_popcnt, 0x1, 0, ECX, 23, 0, NULL},
    {"abm", code_abm, 0x80000001, 0, ECX, 5, 31, "BSR"},
    {"sse4a", code_sse4a, 0x80000001, 0, ECX, 6, 0, NULL},
    {"fma4", code_fma4, 0x80000001, 0, ECX, 16, 0, NULL},
    {"3dnowext", code_3dnowext, 0x80000001, 0, EDX, 30, 0, NULL},
    {"3dnow", code_3dnow, 0x80000001, 0, EDX, 31, 0, NULL},
    {"prefetchw", code_prefetchw, 0x80000001, 0, ECX, 8, 0, NULL},
    {"rdtscp", code_rdtscp, 0x80000001, 0, EDX, 27, 0, NULL},
    {"aes", code_aes, 0x1, 0, ECX, 25, 0, NULL},
    {"pclmulqdq", code_pclmulqdq, 0x1, 0, ECX, 1, 0, NULL},
    {"sha_ni", code_sha_ni, 0x7, 0, EBX, 29, 0, NULL},
    {"movbe", code_movbe, 0x1, 0, ECX, 22, 0, NULL},
    {"rdrand", code_rdrand, 0x1, 0, ECX, 30, 0, NULL},
    {"rdseed", code_rdseed, 0x7, 0, EBX, 18, 0, NULL},
    {"adx", code_adx, 0x7, 0, EBX, 19, 0, NULL},
    {"bmi1", code_bmi1, 0x7, 0, EBX, 3, 0, NULL},
    {"bmi1.tzcnt", code_bmi1_tzcnt, 0x7, 0, EBX, 3, 32, "BSF"},
    {"bmi2", code_bmi2, 0x7, 0, EBX, 8, 0, NULL},
    {"clflushopt", code_clflushopt, 0x7, 0, EBX, 23, 0, NULL},
    {"clwb", code_clwb, 0x7, 0, EBX, 24, 0, NULL},
    {"cr4.umip", code_cr4_umip, 0x7, 0, ECX, 2, 0, NULL},
    {"cr4.fsgsbase", code_cr4_fsgsbase, 0x7, 0, EBX, 0, 0, NULL},
    {"cr4.pcide", code_cr4_pcide, 0x1, 0, ECX, 17, 0, NULL},
    {"cr4.smep", code_cr4_smep, 0x7, 0, EBX, 7, 0, NULL},
    {"cr4.smap", code_cr4_smap, 0x7, 0, EBX, 20, 0, NULL},
    {"cr4.pke", code_cr4_pke, 0x7, 0, ECX, 3, 0, NULL},
    /* What needs XSAVE comes after the attempt to turn it on. */
    {"cr4.osxsave", code_cr4_osxsave, 0x1, 0, ECX, 26, 0, NULL},
    {"xsave", code_xsave, 0x1, 0, ECX, 26, 0, NULL},
    {"xcr0.avx", code_enable_avx, 0x1, 0, ECX, 28, 0, NULL},
    {"avx", code_avx, 0x1, 0, ECX, 28, 0, NULL},
    {"f16c", code_f16c, 0x1, 0, ECX, 29, 0, NULL},
    {"fma", code_fma, 0x1, 0, ECX, 12, 0, NULL},
    {"avx2", code_avx2, 0x7, 0, EBX, 5, 0, NULL},
};

static uint32_t highest_leaf(uint32_t first)
{
    struct registers answer;
    cpuid(first, 0, &answer);
    return answer.eax;
}

/* Whether CPUID shows the feature. A leaf beyond the highest shows nothing, whatever its answer repeats. */
static bool visible(const struct attempt *attempt)
{
    struct registers answer;
    if (attempt->leaf > highest_leaf(attempt->leaf & 0x80000000))
        return false;
    cpuid(attempt->leaf, attempt->subleaf, &answer);
    const uint32_t *registers = &answer.eax;
    return registers[attempt->reg] >> attempt->bit & 1;
}

static void print_vector(int vector)
{
    if (vector == INVALID_OPCODE) {
        PRINT("#UD");
    } else if (vector == 13) {
        PRINT("#GP");
    } else if (vector == 7) {
        PRINT("#NM");
    } else {
        PRINT("exception ");
        console_decimal((uint64_t)vector);
    }
}

int guest_main(const char *cmdline, uint64_t ram_bytes, uint64_t vcpus)
{
    (void)cmdline, (void)ram_bytes, (void)vcpus;
    exceptions_init();
    for (size_t i = 0; i < sizeof attempts / sizeof attempts[0]; i++) {
        const struct attempt *attempt = &attempts[i];
        console_string(attempt->name);
        if (visible(attempt))
            PRINT(" visible ");
        else
            PRINT(" hidden ");
        trying = true;
        int vector = try_code(attempt->code);
        trying = false;
        if (vector >= 0) {
            print_vector(vector);
        } else {
            PRINT("runs");
            if (attempt->as && counted != attempt->counts) {
                PRINT(" as ");
                console_string(attempt->as);
            }
        }
        PRINT("\n");
    }
    return 0;
}
