/* SPDX-License-Identifier: MIT
 *
 * The multiboot header: modules on page boundaries, memory information. The addresses at the end count for the same
 * image as a flat file (flag 16 set there by who makes it): an ELF file has its own.
 */
        .file   "header.S"
        .set    FLAGS, 0x00000003
        .section .multiboot, "a"
        .balign 4
header: .long   0x1badb002, FLAGS, -(0x1badb002 + FLAGS)
        .long   header, image_start, image_load_end, image_end, _start

        .section .note.GNU-stack, "", @progbits
