package main

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"net"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	grpcbackoff "google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// etcdTimeout bounds an attempt. With etcd's defaults, the election of a new leader takes
// one to two seconds.
const etcdTimeout = 3 * time.Second

// etcdWriteTimeout bounds the creation of a lock at a server that has just answered a
// read.
const etcdWriteTimeout = time.Second

// etcdSettings are the settings that all etcd servers share.
type etcdSettings struct {
	username, password        string    // empty for none
	caFile, certFile, keyFile string    // PEM; empty for none
	resolver                  *resolver // nil: processResolver
}

// etcdLock is a lock in an etcd cluster: a key with a lease that expires after the lock's
// expiration. etcd grants leases of whole seconds, and none shorter than one and a half
// times its election timeout (2 s with its defaults).
type etcdLock struct {
	members  []*etcdServer
	attempts attempts
}

func newEtcdLock(addresses []string, settings etcdSettings) *etcdLock {
	l := new(etcdLock)
	for _, a := range addresses {
		l.members = append(l.members, &etcdServer{address: a, settings: settings})
	}
	return l
}

// tryLock implements locker. An attempt takes at most etcdTimeout, and as long again to
// undo its changes.
func (l *etcdLock) tryLock(ctx context.Context, name string, expiration time.Duration) (unlockFunc, error) {
	return l.attempts.do(ctx, l.servers(), func(ctx context.Context) (unlockFunc, error) {
		ctx, cancel := context.WithTimeout(ctx, etcdTimeout)
		defer cancel()
		return l.attempt(ctx, name, expiration)
	})
}

// servers implements locker.
func (l *etcdLock) servers() []string {
	var names []string
	for _, m := range l.members {
		names = append(names, "lock etcd "+m.address)
	}
	return names
}

// attempt checks whether the key exists. If not, it grants a lease and creates the key
// with it.
func (l *etcdLock) attempt(ctx context.Context, name string, expiration time.Duration) (unlockFunc, error) {
	server, taken, err := l.lookUp(ctx, name)
	if err != nil {
		return nil, err
	}
	if taken {
		return nil, errLockTaken
	}
	// We choose the ID of the lease, so that we can revoke it even if the answer to the
	// grant is lost.
	lease := clientv3.LeaseID(1 + rand.Int64N(math.MaxInt64))
	created, err := server.create(ctx, name, lease, expiration)
	if err == nil && created {
		return func(ctx context.Context) error { return l.revoke(ctx, lease) }, nil
	}
	// Also after an error: etcd may have created the key. If the revocation fails, the
	// lease expires.
	_ = l.revoke(context.WithoutCancel(ctx), lease)
	if err != nil {
		return nil, server.failure("create the key", err)
	}
	return nil, errLockTaken
}

// lookUp asks all servers at once whether the key exists, so that a hanging server costs
// no time. It returns the first server that answers: that one is up, and its cluster has
// a leader.
func (l *etcdLock) lookUp(ctx context.Context, name string) (server *etcdServer, taken bool, err error) {
	type answer struct {
		server *etcdServer
		taken  bool
		err    error
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	answers := make(chan answer, len(l.members))
	for _, s := range l.members {
		l.attempts.Go(func() {
			a := answer{server: s}
			client, err := s.connect(ctx)
			if err == nil {
				var got *clientv3.GetResponse
				if got, err = client.Get(ctx, name, clientv3.WithCountOnly()); err == nil {
					a.taken = got.Count > 0
				}
			}
			if err != nil {
				a.err = s.failure("look for the key", err)
			}
			answers <- a
		})
	}
	var errs []error
	for range l.members {
		a := <-answers
		if a.err == nil {
			return a.server, a.taken, nil
		}
		errs = append(errs, a.err)
	}
	return nil, false, serverErrors(errs)
}

// revoke asks all servers to end a lease, and with it the key; one success is enough. An
// expired lease counts as revoked.
func (l *etcdLock) revoke(ctx context.Context, lease clientv3.LeaseID) error {
	ctx, cancel := context.WithTimeout(ctx, etcdTimeout)
	defer cancel()
	errs := make(chan error, len(l.members))
	for _, s := range l.members {
		l.attempts.Go(func() {
			client, err := s.connect(ctx)
			if err == nil {
				_, err = client.Revoke(ctx, lease)
			}
			if errors.Is(err, rpctypes.ErrLeaseNotFound) {
				err = nil
			}
			if err != nil {
				err = s.failure("revoke the lease", err)
			}
			errs <- err
		})
	}
	var failed []error
	for range l.members {
		err := <-errs
		if err == nil {
			return nil
		}
		failed = append(failed, err)
	}
	return serverErrors(failed)
}

func (l *etcdLock) scripted() []scriptedServer { return nil }

func (l *etcdLock) close() error {
	l.attempts.Wait()
	var errs []error
	for _, s := range l.members {
		errs = append(errs, s.close())
	}
	return errors.Join(errs...)
}

// etcdServer is one member of the cluster, with its own client. A client for n members
// would keep sending every n-th call to a hanging member.
type etcdServer struct {
	address  string
	settings etcdSettings

	mu     sync.Mutex
	client *clientv3.Client // set by connect; it reconnects by itself
}

// connect returns the client, and makes it at the first call that finds the server up:
// with a user name, making a client logs in.
func (s *etcdServer) connect(ctx context.Context) (*clientv3.Client, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.client != nil {
		return s.client, nil
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	// By default, gRPC waits for minutes before it reconnects to a server that was away
	// for minutes.
	reconnect := grpc.ConnectParams{
		Backoff:           grpcbackoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 2, Jitter: 0.2, MaxDelay: time.Second},
		MinConnectTimeout: etcdTimeout,
	}
	dial := func(ctx context.Context, address string) (net.Conn, error) {
		return cmp.Or(s.settings.resolver, processResolver).dial(ctx, "tcp", address)
	}
	config := clientv3.Config{
		Endpoints:            []string{s.address},
		DialTimeout:          etcdTimeout,
		DialKeepAliveTime:    10 * time.Second,
		DialKeepAliveTimeout: 3 * time.Second,
		DialOptions: []grpc.DialOption{grpc.WithChainUnaryInterceptor(failFast), grpc.WithConnectParams(reconnect),
			grpc.WithContextDialer(dial)},
		MaxUnaryRetries: 2, // the second follows a new log-in if the token has expired
		Username:        s.settings.username,
		Password:        s.settings.password,
		Logger:          zap.NewNop(), // we report all errors
	}
	var err error
	if config.TLS, err = s.settings.tls(); err != nil {
		return nil, err
	}
	s.client, err = clientv3.New(config)
	return s.client, err
}

// tls returns nil for plain connections.
func (s etcdSettings) tls() (*tls.Config, error) {
	if s.caFile == "" && s.certFile == "" {
		return nil, nil
	}
	c := &tls.Config{MinVersion: tls.VersionTLS12}
	var err error
	if c.RootCAs, err = readCA(s.caFile); err != nil {
		return nil, err
	}
	if s.certFile != "" {
		c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			pair, err := tls.LoadX509KeyPair(s.certFile, s.keyFile)
			return &pair, err
		}
	}
	return c, nil
}

// create grants a lease, and creates the key with it unless the key exists.
func (s *etcdServer) create(ctx context.Context, name string, lease clientv3.LeaseID,
	expiration time.Duration) (created bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, etcdWriteTimeout)
	defer cancel()
	leases := etcdserverpb.NewLeaseClient(s.client.ActiveConnection())
	grant := &etcdserverpb.LeaseGrantRequest{ID: int64(lease), TTL: int64(seconds(expiration))}
	if _, err := leases.LeaseGrant(ctx, grant); err != nil {
		return false, err
	}
	answer, err := s.client.Txn(ctx).
		If(clientv3.Compare(clientv3.CreateRevision(name), "=", 0)).
		Then(clientv3.OpPut(name, "", clientv3.WithLease(lease))).
		Commit()
	if err != nil {
		return false, err
	}
	return answer.Succeeded, nil
}

// failFast makes a call fail at once, with the reason, if its server cannot be reached.
// By default, etcd's client waits.
func failFast(ctx context.Context, method string, request, reply any, conn *grpc.ClientConn,
	invoke grpc.UnaryInvoker, options ...grpc.CallOption) error {
	return invoke(ctx, method, request, reply, conn, append(options, grpc.WaitForReady(false))...)
}

// failure adds the server and the action to an error.
func (s *etcdServer) failure(what string, err error) error {
	if errors.Is(err, context.DeadlineExceeded) || status.Code(err) == codes.DeadlineExceeded {
		err = fmt.Errorf("no answer, or no leader: %w", context.DeadlineExceeded)
	}
	return fmt.Errorf("lock etcd %s: %s: %w", s.address, what, err)
}

func (s *etcdServer) close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.client == nil {
		return nil
	}
	return s.client.Close()
}
