/* SPDX-License-Identifier: MIT
 *
 * Messages over a link; pages that come among them land on the way.
 */
#include <errno.h>
#include <string.h>

#include "migration/link.h"

static int send_message(struct pyhv_link *link, uint32_t type, const void *payload, size_t length, int more,
                        struct pyhv_error *error)
{
    if (link_wait(link, LINK_SENT, UINT64_MAX, error) < 0) /* what an earlier call left */
        return -1;
    if (length)
        memcpy(link->out.buffer + LINK_HEADER, payload, length);
    link_seal(link, type, LINK_HEADER, length, 0);
    link->out.more = more != 0;
    int result = link_wait(link, LINK_SENT, UINT64_MAX, error);
    link->out.more = false;
    return result < 0 ? -1 : 0;
}

int pyhv_link_send(struct pyhv_link *link, uint32_t type, const void *payload, size_t length, int more,
                   struct pyhv_error *error)
{
    if (type <= PYHV_MESSAGE_PAGES_ZSTD || length > PYHV_MESSAGE_MAX)
        return pyhv_fail(error, EINVAL, "pyhv_link_send", "%zu bytes, type %u", length, type);
    link_enter(link);
    return link_leave(link, send_message(link, type, payload, length, more, error));
}

static int receive(struct pyhv_link *link, struct pyhv_landing *landing, uint64_t deadline,
                   struct pyhv_message *message, struct pyhv_error *error)
{
    for (;;) {
        int found = link_wait(link, LINK_MESSAGE, deadline, error);
        if (found <= 0)
            return found;
        *message = link_message(link);
        if (message->type != PYHV_MESSAGE_PAGES && message->type != PYHV_MESSAGE_PAGES_ZSTD) {
            link->in.used = LINK_HEADER + message->length;
            return 1;
        }
        if (!landing)
            return link_bad(error, "pages were not expected");
        found = link_land(link, landing, deadline, error);
        if (found <= 0)
            return found;
        link_consume(link);
        if (link_now() >= deadline + LINK_GRACE)
            return 0;
    }
}

int pyhv_link_receive(struct pyhv_link *link, struct pyhv_landing *landing, uint32_t timeout_ms,
                      struct pyhv_message *message, struct pyhv_error *error)
{
    link_enter(link);
    return link_leave(link, receive(link, landing, link_now() + timeout_ms * LINK_NS_PER_MS, message, error));
}
