"""The benchmarks: each row is measured against a named peer in the same run. README.md says how to read them."""
