/* SPDX-License-Identifier: MIT
 *
 * The note that says where PVH enters the image (Xen, public/elfnote.h: XEN_ELFNOTE_PHYS32_ENTRY).
 */
        .file   "note.S"
        .section .note.Xen, "a", @note
        .balign 4
        .long   2f - 1f, 4f - 3f, 18
1:      .asciz  "Xen"
2:      .balign 4
3:      .long   _start
4:

        .section .note.GNU-stack, "", @progbits
