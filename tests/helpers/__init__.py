"""Networks, images and checks that several tests share."""
