//! Tests of the scheduler as its users see it: tables of small situations, and random histories on a simulated device.
#![forbid(unsafe_code)]

mod device;
mod driver;
mod histories;
mod policy;
