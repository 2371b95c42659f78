//! Doors for the fuzz targets (`cfg(fuzzing)`): the readers of bytes from other ranks, without a team around them. Nothing of
//! the product uses them.

use std::io::{Read, Write};
use std::net::TcpStream;

use serde::de::DeserializeOwned;

use crate::channel::{Prefix, receive};
use crate::handshake::{self, Key};

/// Reads the messages of a plan connection until one is not of type `T`.
pub fn plans<T: DeserializeOwned>(bytes: &[u8]) {
    messages::<T>(bytes, Prefix::Plan);
}

/// The same of a bulk connection.
pub fn bulk<T: DeserializeOwned>(bytes: &[u8]) {
    messages::<T>(bytes, Prefix::Bulk);
}

fn messages<T: DeserializeOwned>(mut bytes: &[u8], prefix: Prefix) {
    let mut buffer = Vec::new();
    while receive::<T>(&mut bytes, &mut buffer, prefix).is_ok() {}
}

/// Reads what a leader answers to an introduction.
pub fn verdict(bytes: &[u8]) {
    handshake::read_verdict(bytes);
}

/// Joins like a rank that knows `token`, and says `said` of itself.
///
/// # Errors
/// The connection has broken.
pub fn introduce(stream: &mut TcpStream, token: &str, said: &[u8]) -> std::io::Result<()> {
    let mine = handshake::knock()?;
    stream.write_all(&mine)?;
    let mut theirs = [0; handshake::KNOCK_BYTES];
    stream.read_exact(&mut theirs)?;
    let proof = Key::new(token).proof(handshake::JOINER, &[mine, theirs], said);
    stream.write_all(proof.as_bytes())?;
    stream.write_all(&(said.len() as u32).to_le_bytes())?;
    stream.write_all(said)
}
