//! Page identity, page store and page codec: how two gateways speak of pages.
