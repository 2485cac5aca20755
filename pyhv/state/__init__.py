"""What a VM is, apart from what runs it: typed, versioned records, and the codec that snapshots and migration share."""
