//! Codes of instructions and numbers of registers, as far as our programs have them.
//!
//! Codes with 32 in their names are of the lower halves of registers.
#![allow(missing_docs, reason = "the names say it")]

/// The register of a program's result.
pub const RESULT: u8 = 0;
/// The register of what a program is told.
pub const CONTEXT: u8 = 1;
/// The register of the stack, which grows down.
pub const STACK: u8 = 10;

pub const LOAD_WORD: u8 = 0x61;
/// Takes two instructions.
pub const LOAD_DOUBLE_IMMEDIATE: u8 = 0x18;
pub const STORE_WORD: u8 = 0x63;
pub const STORE_WORD_IMMEDIATE: u8 = 0x62;
pub const MOVE: u8 = 0xb7;
pub const MOVE_32: u8 = 0xb4;
pub const MOVE_REGISTER: u8 = 0xbf;
pub const MOVE_REGISTER_32: u8 = 0xbc;
pub const ADD: u8 = 0x07;
pub const AND: u8 = 0x57;
pub const AND_32: u8 = 0x54;
pub const SHIFT_RIGHT_32: u8 = 0x74;
pub const JUMP: u8 = 0x05;
pub const JUMP_EQUAL: u8 = 0x15;
pub const JUMP_EQUAL_32: u8 = 0x16;
pub const JUMP_NOT_EQUAL: u8 = 0x55;
pub const JUMP_NOT_EQUAL_32: u8 = 0x56;
pub const CALL: u8 = 0x85;
pub const EXIT: u8 = 0x95;
