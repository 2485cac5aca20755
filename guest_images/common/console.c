/* SPDX-License-Identifier: MIT
 *
 * Output on the first serial port. It does not wait for the transmitter: the VMM takes every byte at once, and
 * polling the line status register would double the exits.
 */
#include "guest.h"

enum { SERIAL_DATA = 0x3f8 };

#define DIGIT(n)   ((n) < 10 ? '0' + (n) : 'a' + (n)-10)
#define PAIR(b)    (DIGIT((b) >> 4) | DIGIT((b)&15) << 8)
#define PAIRS4(b)  PAIR(b), PAIR((b) + 1), PAIR((b) + 2), PAIR((b) + 3)
#define PAIRS16(b) PAIRS4(b), PAIRS4((b) + 4), PAIRS4((b) + 8), PAIRS4((b) + 12)
#define PAIRS64(b) PAIRS16(b), PAIRS16((b) + 16), PAIRS16((b) + 32), PAIRS16((b) + 48)
const uint16_t hex_pairs[256] = {PAIRS64(0), PAIRS64(64), PAIRS64(128), PAIRS64(192)};

void console_write(const char *text, size_t length)
{
    __asm__ volatile("rep outsb" : "+S"(text), "+c"(length) : "d"(SERIAL_DATA) : "memory");
}

void console_string(const char *text)
{
    size_t length = 0;
    while (text[length])
        length++;
    console_write(text, length);
}

void console_decimal(uint64_t value)
{
    char digits[20]; /* 2^64 - 1 has twenty */
    size_t first = sizeof digits;
    do {
        digits[--first] = (char)('0' + value % 10);
        value /= 10;
    } while (value);
    console_write(digits + first, sizeof digits - first);
}

void console_hex(uint64_t value, int digits)
{
    uint16_t text[1 + 8] = {'0' | 'x' << 8};
    for (int pair = digits / 2; pair > 0; pair--) {
        text[pair] = hex_pairs[value & 0xff];
        value >>= 8;
    }
    console_write((const char *)text, 2 + (size_t)digits);
}
