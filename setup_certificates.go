package main

import "context"

func (s *setup) keepAuthority(context.Context) error          { return nil }
func (s *setup) keepRedisCertificate(context.Context) error   { return nil }
func (s *setup) keepTrust(context.Context) error              { return nil }
func (s *setup) keepWebhookCertificate(context.Context) error { return nil }
func (s *setup) keepPath(context.Context) error               { return nil }
