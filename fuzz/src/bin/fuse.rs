#![no_main]
#![allow(missing_docs)]
bulkhead_fuzz::program!(bulkhead_fuzz::fuse::run);
