"""Who asks: credentials, and answers to challenges.

credentials     the node's own, in order of precedence
dockerconfig    config.json and auth.json as data
helpers         programs that hand out credentials
challenge       WWW-Authenticate, scopes, token answers as data
claims          what a token that is a JWT says of itself
authorizer      Basic and Bearer, with a token cache
"""
