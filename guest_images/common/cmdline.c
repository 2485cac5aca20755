/* SPDX-License-Identifier: MIT
 *
 * Words and options of the command line.
 */
#include "guest.h"

static bool is_blank(char c)
{
    return c == ' ' || c == '\t';
}

const char *cmdline_value(const char *cmdline, const char *prefix)
{
    while (*cmdline) {
        while (is_blank(*cmdline))
            cmdline++;
        const char *expected = prefix;
        while (*expected && *cmdline == *expected) {
            cmdline++;
            expected++;
        }
        if (!*expected)
            return cmdline;
        while (*cmdline && !is_blank(*cmdline))
            cmdline++;
    }
    return NULL;
}

bool cmdline_has(const char *cmdline, const char *word)
{
    const char *rest = cmdline;
    while ((rest = cmdline_value(rest, word))) {
        if (!*rest || is_blank(*rest))
            return true;
        /* A longer word: on to the blank after it. */
        while (*rest && !is_blank(*rest))
            rest++;
    }
    return false;
}

uint64_t cmdline_number(const char *cmdline, const char *prefix, uint64_t fallback)
{
    const char *text = cmdline_value(cmdline, prefix);
    if (!text)
        return fallback;
    uint64_t value = 0;
    const char *at = text;
    while (*at >= '0' && *at <= '9' && value < (UINT64_MAX >> 1) / 10)
        value = value * 10 + (uint64_t)(*at++ - '0');
    if (at > text && (!*at || is_blank(*at)))
        return value;
    console_string(prefix);
    while (*text && !is_blank(*text))
        console_write(text++, 1);
    PRINT(": not a number that this guest takes\n");
    guest_exit(2);
}
