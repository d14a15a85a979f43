"""The pod network.

plugin      which networks there are, attaching and detaching a pod
cni         CNI configuration and plugins
template    the part of Go's text/template that CNI templates use
"""
