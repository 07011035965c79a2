//! Test kit: real guests, an emulated WAN and faults.
