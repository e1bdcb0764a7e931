package rig

import (
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
)

// Texts that the program logs and its users rely on.
const (
	HeldText      = "holding the token"
	ReasonWaiting = "WaitingForToken" // of the event of a gated pod in line
)

// StartProgram starts the program.
func StartProgram(t testing.TB, args ...string) *Process {
	t.Helper()
	p := NewProcess(Program(t), args...)
	if podUID, ok := podUIDs.Load(t); ok {
		p.Cmd.Env = append(os.Environ(), "POD_UID="+podUID.(string))
	}
	p.Start(t)
	return p
}

// podUIDs has the UIDs of the pods that InPod has made, by test.
var podUIDs sync.Map

// InPod makes the sidecars and awaits of a test containers of one pod. It returns the
// pod's UID; if uid is empty, that is a new one.
func InPod(t testing.TB, uid string) string {
	t.Helper()
	if uid == "" {
		uid = uuid.NewString()
	}
	podUIDs.Store(t, uid)
	t.Cleanup(func() { os.Remove(StartMark(uid)) })
	return uid
}

// StartMark returns the file that tells a sidecar that its pod's app may have started. It
// has the UID of the pod.
func StartMark(podUID string) string {
	return filepath.Join("/dev/shm", "at-least-semaphore-pod-"+podUID)
}

// StartSidecar starts a sidecar with a heartbeat each second.
func StartSidecar(t testing.TB, address string, id fmt.Stringer, token string, flags ...string) *Process {
	t.Helper()
	args := append([]string{"sidecar", "--queue-redis-address=" + QueueAddress(address),
		"--heartbeat-interval-seconds=1", "--stale-threshold-seconds=120"}, flags...)
	return StartProgram(t, append(args, id.String(), token)...)
}

// StartWaitingSidecar starts a sidecar that acquires its token itself.
func StartWaitingSidecar(
	t testing.TB, address string, id fmt.Stringer, token string, length int, flags ...string,
) *Process {
	t.Helper()
	waits := []string{fmt.Sprintf("--length=%d", length), "--redis-addresses=" + address}
	return StartSidecar(t, address, id, token, append(waits, flags...)...)
}

// StartAwait starts the init container that waits for the token.
func StartAwait(t testing.TB) *Process {
	t.Helper()
	return StartProgram(t, "await")
}

// LimitMemoryAsDeployed sets Go's memory settings of deploy/ for the processes that the
// test starts later.
func LimitMemoryAsDeployed(t *testing.T) {
	t.Helper()
	manifest := ReadFile(t, "deploy/base/webhook.yaml")
	for _, variable := range []string{"GOMEMLIMIT", "GOGC"} {
		m := regexp.MustCompile(`name: ` + variable + `\n +value: "?(\w+)"?\n`).FindStringSubmatch(manifest)
		if m == nil {
			t.Fatalf("deploy/base/webhook.yaml does not set %s", variable)
		}
		t.Setenv(variable, m[1])
	}
}

// Service is a process with health checks and metrics.
type Service struct {
	*Process
	HealthURL string
}

// WantReady waits until the service is ready.
func (s *Service) WantReady(t testing.TB) {
	t.Helper()
	Eventually(t, 20*time.Second, func() error {
		if s.Ended() {
			t.Fatalf("ended with %d:\n%s", s.ExitCode(), s.Log.String())
		}
		response, err := http.Get(s.HealthURL + "/readyz")
		if err != nil {
			return err
		}
		defer response.Body.Close()
		if response.StatusCode != http.StatusOK {
			return errors.New(response.Status)
		}
		return nil
	})
}

// IsReady reports whether the service says that it is ready.
func (s *Service) IsReady(t testing.TB) bool {
	t.Helper()
	response, err := http.Get(s.HealthURL + "/readyz")
	Must(t, err)
	defer response.Body.Close()
	return response.StatusCode == http.StatusOK
}

// Metrics returns the response of /metrics.
func (s *Service) Metrics(t testing.TB) string {
	t.Helper()
	response, err := http.Get(s.HealthURL + "/metrics")
	Must(t, err)
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	Must(t, err)
	return string(text)
}

// Metric returns the value of one series, NAME or NAME{LABELS}. ok is false if the
// service has no such series.
func (s *Service) Metric(t testing.TB, series string) (value float64, ok bool) {
	t.Helper()
	m := regexp.MustCompile(`(?m)^` + regexp.QuoteMeta(series) + ` (\S+)$`).FindStringSubmatch(s.Metrics(t))
	if m == nil {
		return 0, false
	}
	value, err := strconv.ParseFloat(m[1], 64)
	Must(t, err)
	return value, true
}

// Webhook is the program in the mode webhook.
type Webhook struct {
	Service
	URL     string
	CertDir string
	Client  *http.Client
}

// StartWebhook starts the webhook and waits until it is ready. address is the Redis for
// tokens and lock.
func StartWebhook(t testing.TB, address string, flags ...string) *Webhook {
	t.Helper()
	return StartWebhookOf(t, Program(t), address, flags...)
}

// StartWebhookOf is StartWebhook with another build of the program.
func StartWebhookOf(t testing.TB, program, address string, flags ...string) *Webhook {
	t.Helper()
	w := NewWebhook(t, program, address, flags...)
	w.Begin(t)
	return w
}

// NewWebhook returns a webhook, not started.
func NewWebhook(t testing.TB, program, address string, flags ...string) *Webhook {
	t.Helper()
	w := &Webhook{CertDir: t.TempDir()}
	WriteCertificate(t, w.CertDir, 1)
	serving, health := FreeAddress(t), FreeAddress(t)
	host, port, _ := net.SplitHostPort(serving)
	w.URL, w.HealthURL = "https://"+serving, "http://"+health
	w.Process = NewProcess(program, append([]string{"webhook", "--host=" + host, "--port=" + port,
		"--metrics-bind-address=" + health, "--certDir=" + w.CertDir, "--queue-redis-address=" + address,
		"--redis-addresses=" + address}, flags...)...)
	w.Client = &http.Client{Transport: &http.Transport{
		MaxIdleConnsPerHost: 25, // as the API server's
		// The certificate changes. Tests check its serial number.
		TLSClientConfig: &tls.Config{InsecureSkipVerify: true},
	}}
	return w
}

// Begin starts the webhook and waits until it is ready.
func (w *Webhook) Begin(t testing.TB) {
	t.Helper()
	w.Start(t)
	t.Cleanup(w.Client.CloseIdleConnections)
	w.WantReady(t)
}

// Post sends a body to /mutate. serial is the serial number of the webhook's certificate.
func (w *Webhook) Post(body []byte) (status int, text string, serial int64, err error) {
	response, err := w.Client.Post(w.URL+"/mutate?timeout=10s", "application/json", bytes.NewReader(body))
	if err != nil {
		return 0, "", 0, err
	}
	defer response.Body.Close()
	b, err := io.ReadAll(response.Body)
	return response.StatusCode, string(b), response.TLS.PeerCertificates[0].SerialNumber.Int64(), err
}

// TryAdmit sends a review. It returns an error unless the webhook answers with a
// decision.
func (w *Webhook) TryAdmit(body []byte) (Admission, error) {
	status, text, _, err := w.Post(body)
	if err != nil {
		return Admission{}, err
	}
	return ReadAdmission(status, text)
}

// Admit is TryAdmit, but fails the test if there is no decision.
func (w *Webhook) Admit(t testing.TB, body []byte) Admission {
	t.Helper()
	a, err := w.TryAdmit(body)
	Must(t, err)
	return a
}

// WantAdmitted admits a pod, which must get a token, and returns the token.
func (w *Webhook) WantAdmitted(t testing.TB, id fmt.Stringer, length int) string {
	t.Helper()
	a := w.Admit(t, Review(t, id, length))
	if !a.Allowed || a.Token == "" {
		t.Fatalf("%s: not admitted: %d %s", id, a.Code, a.Message)
	}
	return a.Token
}

// Gate is the program in the mode gate.
type Gate struct{ Service }

// StartGate starts a gate and waits until it is ready. address is the Redis for tokens
// and lock.
func StartGate(t testing.TB, api *APIServer, address string, flags ...string) *Gate {
	t.Helper()
	g := NewGate(t, Program(t), api, address, flags...)
	g.Start(t)
	g.WantReady(t)
	return g
}

// NewGate returns a gate, not started.
func NewGate(t testing.TB, program string, api *APIServer, address string, flags ...string) *Gate {
	t.Helper()
	health := FreeAddress(t)
	args := []string{"gate", "--queue-redis-address=" + address, "--redis-addresses=" + address,
		"--metrics-bind-address=" + health, "--kubernetes-address=" + api.Address,
		"--kubernetes-ca-file=" + api.CAFile, "--kubernetes-token-file=" + api.TokenFile}
	return &Gate{Service{NewProcess(program, append(args, flags...)...), "http://" + health}}
}
