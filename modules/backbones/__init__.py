"""Policy networks behind one interface, `base.Backbone`."""
