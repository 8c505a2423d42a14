//! Devices of a build without them: there are none, so nothing here can be called.

use std::sync::Arc;

use super::parcel::{Delivered, Parcel, Span};
use super::{DeviceMemory, Download, Rate, ShardSpec};
use crate::error::{Error, ErrorKind, Result};
use crate::io::Pinner;

/// See `cuda/gpu.rs`.
#[derive(Debug)]
pub(crate) enum Gpu {}

/// See `cuda/delivery.rs`.
#[derive(Debug)]
pub(crate) struct Delivery<'g>(&'g Gpu);

/// See `cuda/crossing.rs`.
#[derive(Debug)]
pub(crate) enum Crossing {}

impl Crossing {
    pub(crate) fn finish(self) -> Result<()> {
        match self {}
    }
}

/// See `cuda/measure.rs`.
#[derive(Debug)]
pub(crate) struct Gauge<'g>(&'g Gpu);

impl<'g> Gauge<'g> {
    pub(crate) fn new(gpu: &'g Gpu, _: usize) -> Result<Self> {
        match *gpu {}
    }

    pub(crate) fn bytes(&self) -> usize {
        match *self.0 {}
    }

    pub(crate) fn round(&mut self) -> Result<Vec<Rate>> {
        match *self.0 {}
    }
}

/// See `cuda/gpu.rs`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Staging {
    pub(crate) slot_bytes: usize,
    pub(crate) workers: usize,
}

impl Gpu {
    pub(crate) fn open(ordinal: u32, _: Staging) -> Result<Arc<Self>> {
        Err(not_built(ordinal))
    }

    pub(crate) fn ordinal(&self) -> u32 {
        match *self {}
    }

    pub(crate) unsafe fn start<'g>(&'g self, _: &[Parcel<'_>]) -> Result<Delivery<'g>> {
        match *self {}
    }

    pub(crate) unsafe fn send(self: &Arc<Self>, _: &[u8], _: Span) -> Result<Crossing> {
        match **self {}
    }

    pub(crate) unsafe fn copy_from(&self, _: Span, _: Span, _: &Self) -> Result<()> {
        match *self {}
    }

    pub(crate) fn reach(&self, _: &Self) -> Result<()> {
        match *self {}
    }

    pub(crate) fn settle(&self) -> Result<()> {
        match *self {}
    }

    pub(crate) unsafe fn follow(&self, _: u64) -> Result<()> {
        match *self {}
    }

    pub(crate) fn locked_bytes_at_most(&self) -> u64 {
        match *self {}
    }

    pub(crate) fn held_bytes(&self) -> (u64, u64) {
        match *self {}
    }

    pub(crate) fn pinner(&self) -> Arc<dyn Pinner> {
        match *self {}
    }

    pub(crate) fn downloader(&self) -> Arc<dyn Download> {
        match *self {}
    }

    pub(crate) fn expect_room(&self, _: &[&ShardSpec]) -> Result<()> {
        match *self {}
    }

    pub(crate) fn prepare(self: &Arc<Self>, _: &[&ShardSpec]) -> Result<Vec<DeviceMemory>> {
        match **self {}
    }
}

/// See `cuda/gpu.rs`.
pub(super) fn free_bytes(ordinal: u32) -> Result<u64> {
    Err(not_built(ordinal))
}

fn not_built(ordinal: u32) -> Error {
    Error::new(ErrorKind::Device, "this build has no CUDA support")
        .found(format_args!("cuda:{ordinal}"))
        .hint("use `--devices cpu:N`, or build with the feature `cuda`")
}

impl Delivery<'_> {
    pub(crate) fn finish(self) -> Result<Delivered> {
        match *self.0 {}
    }
}
