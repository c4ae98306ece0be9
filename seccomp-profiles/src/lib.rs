//! The seccomp filters of every thread Bulkhead runs.
