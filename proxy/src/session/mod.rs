//! State of a channel's two directions between the gateways, without I/O.
//!
//! A direction is a sequence of frames. [`SendHalf`] keeps every frame until the far side says
//! that its bytes were delivered, so that any loss of the connection can be repaired by sending
//! again; [`RecvHalf`] puts frames back in order and drops those it has seen. [`DeliveryBudget`]
//! decides how much may be accepted from a hypervisor ahead of delivery.

mod budget;
mod recv_half;
mod send_half;

pub use budget::DeliveryBudget;
pub use recv_half::{InFrame, RecvError, RecvHalf};
pub use send_half::{Acked, Class, OutFrame, SendHalf, Transmit};
