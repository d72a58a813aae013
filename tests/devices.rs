//! The devices that kernels are tested on, and typed copies to and from them.

use ponder::device::host::{HostOptions, Order};
use ponder::device::{Buffer, Device, DeviceChoice};

/// The GPU if TEST_DEVICE=cuda; else the host target with every access checked, its threads in three orders, and last as it
/// serves, unchecked. With the address sanitizer only the plain kernels run, because those are what it is compiled into.
pub fn devices() -> Vec<Device> {
    if std::env::var("TEST_DEVICE").is_ok_and(|d| d == "cuda") {
        return vec![Device::open(DeviceChoice::Cuda(0)).unwrap()];
    }
    let checked = |order, seed| HostOptions { checked: !cfg!(feature = "asan"), ..HostOptions::checked(order, seed) };
    let orders = [checked(Order::Ascending, 1), checked(Order::Descending, 2), checked(Order::Random, 3)];
    orders.into_iter().chain([HostOptions::default()]).map(Device::host).collect()
}

/// A buffer with this content; never empty, so that it has an address.
pub fn upload<T: bytemuck::NoUninit>(device: &Device, data: &[T]) -> Buffer {
    let bytes: &[u8] = bytemuck::cast_slice(data);
    let buffer = device.alloc(bytes.len().max(1)).unwrap();
    device.upload(&buffer, 0, bytes).unwrap();
    buffer
}

/// All of a buffer.
pub fn download<T: bytemuck::Pod>(device: &Device, buffer: &Buffer) -> Vec<T> {
    let mut data = vec![T::zeroed(); buffer.bytes() / size_of::<T>()];
    device.download(buffer, 0, bytemuck::cast_slice_mut(&mut data)).unwrap();
    data
}
