"""What a run trains on: files on disk, their loading, decoded copies, images that stay on the device."""
