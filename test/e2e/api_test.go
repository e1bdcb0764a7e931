//go:build e2e

package e2e

import (
	"bufio"
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os/exec"
	"strings"
	"sync"
	"time"
)

// apiProxy is a "kubectl proxy": it has the rights of kubectl, and its connections stay.
// A kubectl for each request would take a node of two cores longer than the request.
type apiProxy struct {
	address string
	process *exec.Cmd
}

// api is for all tests; TestMain starts it.
var api *apiProxy

func startProxy() (*apiProxy, error) {
	cmd := exec.Command("kubectl", "proxy", "--port=0")
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		return nil, err
	}
	line, err := bufio.NewReader(out).ReadString('\n') // Starting to serve on 127.0.0.1:12345
	words := strings.Fields(line)
	if err != nil || len(words) == 0 {
		_ = cmd.Process.Kill()
		return nil, fmt.Errorf("kubectl proxy says %q: %w", line, cmp.Or(err, io.ErrUnexpectedEOF))
	}
	return &apiProxy{words[len(words)-1], cmd}, nil
}

func (a *apiProxy) stop() {
	_ = a.process.Process.Kill()
	_ = a.process.Wait()
}

// refusal is an answer of the API server that is no success.
type refusal struct {
	code    int
	message string
}

func (r *refusal) Error() string { return fmt.Sprintf("%d: %s", r.code, r.message) }

// apiClient gives up a request that has no answer: a connection to an API server that was
// killed may be silent.
var apiClient = &http.Client{Timeout: time.Minute}

// do sends a request with a body, unless that is nil, and returns the answer.
func (a *apiProxy) do(method, path, contentType string, body any) ([]byte, error) {
	var text bytes.Buffer
	if body != nil {
		if err := json.NewEncoder(&text).Encode(body); err != nil {
			return nil, err
		}
	}
	request, err := http.NewRequest(method, "http://"+a.address+path, &text)
	if err != nil {
		return nil, err
	}
	request.Header.Set("Content-Type", contentType)
	response, err := apiClient.Do(request)
	if err != nil {
		return nil, err
	}
	defer response.Body.Close()
	answer, err := io.ReadAll(response.Body)
	if err == nil && response.StatusCode/100 != 2 {
		var status struct{ Message string }
		if json.Unmarshal(answer, &status) != nil || status.Message == "" {
			status.Message = string(answer)
		}
		err = fmt.Errorf("%s %s: %w", method, path, &refusal{response.StatusCode, status.Message})
	}
	return answer, err
}

// get decodes the answer to a GET.
func (a *apiProxy) get(path string, into any) error {
	answer, err := a.do(http.MethodGet, path, "", nil)
	if err == nil {
		err = json.Unmarshal(answer, into)
	}
	return err
}

// create creates an object, in a namespace unless that is empty.
func (a *apiProxy) create(namespace string, o object) error {
	version := o["apiVersion"].(string)
	path := "/apis/" + version
	if !strings.Contains(version, "/") {
		path = "/api/" + version
	}
	if namespace != "" {
		path += "/namespaces/" + namespace
	}
	path += "/" + strings.ToLower(o["kind"].(string)) + "s"
	return errOf(a.do(http.MethodPost, path+"?fieldValidation=Strict", "application/json", o))
}

// shells are open shells in a container: an exec for each script would cost a kubectl,
// and a process of the node's container runtime.
type shells struct {
	pod, container string

	mu   sync.Mutex
	idle []*openShell
}

type openShell struct {
	process *exec.Cmd
	in      io.WriteCloser
	out     *bufio.Reader
}

// inRedis are shells beside Redis. redisCLI is a command in there that sends Redis commands
// as the webhook's user.
var (
	inRedis  = &shells{pod: "deployment/redis", container: "redis"}
	redisCLI string
)

// findRedis sets redisCLI for what is installed.
func findRedis() error {
	if installed == sentinelFolder {
		inRedis.pod, redisCLI = "redis-0", "sh /etc/redis/cli.sh"
		return nil
	}
	password, err := hook("get", "secret", "redis", "-o", `go-template={{index .data "webhook-password" | base64decode}}`)
	redisCLI = "REDISCLI_AUTH=" + password + " redis-cli -s /run/redis/redis.sock --user webhook --no-auth-warning"
	return err
}

// run runs a script that only asks, and so can be run twice: a shell that was open may
// have ended with its container.
func (s *shells) run(script string) (string, error) {
	s.mu.Lock()
	var sh *openShell
	if last := len(s.idle) - 1; last >= 0 {
		sh, s.idle = s.idle[last], s.idle[:last]
	}
	s.mu.Unlock()
	if sh != nil {
		if out, ended, err := sh.run(script); !ended {
			s.keep(sh)
			return out, err
		}
		sh.end()
	}
	sh, err := s.open()
	if err != nil {
		return "", err
	}
	out, ended, err := sh.run(script)
	if ended {
		sh.end()
	} else {
		s.keep(sh)
	}
	return out, err
}

func (s *shells) keep(sh *openShell) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.idle = append(s.idle, sh)
}

// close ends those that are idle.
func (s *shells) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, sh := range s.idle {
		sh.end()
	}
	s.idle = nil
}

func (s *shells) open() (*openShell, error) {
	cmd := exec.Command("kubectl", "-n", hookNamespace, "exec", "-i", s.pod, "-c", s.container, "--", "sh")
	var in io.WriteCloser
	out, err := cmd.StdoutPipe()
	if err == nil {
		in, err = cmd.StdinPipe()
	}
	if err == nil {
		cmd.Stderr = cmd.Stdout // why there is no shell
		err = cmd.Start()
	}
	if err != nil {
		return nil, err
	}
	return &openShell{cmd, in, bufio.NewReader(out)}, nil
}

// run returns what the script prints, and whether the shell is of no more use.
func (sh *openShell) run(script string) (out string, ended bool, err error) {
	limit := time.AfterFunc(30*time.Second, func() { _ = sh.process.Process.Kill() })
	defer limit.Stop()
	mark := fmt.Sprintf("end-%016x", rand.Uint64())
	_, err = fmt.Fprintf(sh.in, "(%s\n) </dev/null 2>&1; status=$?; echo; echo %s $status\n", script, mark)
	if err != nil {
		return "", true, err
	}
	var text strings.Builder
	for {
		line, err := sh.out.ReadString('\n')
		if err != nil {
			return "", true, fmt.Errorf("the shell ended: %w: %s%s", err, text.String(), line)
		}
		if status, found := strings.CutPrefix(line, mark+" "); found {
			if status = strings.TrimSpace(status); status != "0" {
				err = fmt.Errorf("exit status %s: %s", status, text.String())
			}
			return text.String(), false, err
		}
		text.WriteString(line)
	}
}

func (sh *openShell) end() {
	_ = sh.process.Process.Kill()
	_ = sh.process.Wait()
}
