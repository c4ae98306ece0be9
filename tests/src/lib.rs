//! Test harness, demo and end-to-end suite.
