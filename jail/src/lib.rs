//! Entering the jail of the processes that face the guest.
