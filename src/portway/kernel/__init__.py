"""What the system gives: processes, descriptors, names, waits."""
